# SPDX-License-Identifier: Apache-2.0
"""Prompts that do not evict while they are read begin with blocks of others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.engines import Engine, Prompt, running_engine
from tests.engine.steps import audited_manager, poisoned_free_blocks
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from vllm_roco.kv_cache.page import (
    MASS_PEAK,
    MASS_SUM,
    NUM_QUERIES,
    statistics_view,
)

pytestmark = pytest.mark.engine

HEADER = random_prompt(50, seed=11)
"""Three blocks and a bit, shorter than a chunk; the first eviction is at 128."""
PROMPTS = [HEADER + random_prompt(20, seed=20 + own) for own in range(4)]
NUM_READ, SHARED = 70, 48
SHORT = 20
LONG = 150
"""A `max_tokens` with which a request evicts."""


@pytest.fixture
def engine(tiny_llama: Path) -> Iterator[Engine]:
    with (
        running_engine(tiny_llama, SMALL_BUDGET, enable_prefix_caching=True) as engine,
        audited_manager(engine),
        poisoned_free_blocks(engine),
    ):
        yield engine


def saved_tokens(engine: Engine) -> int:
    cache = engine.manager.prefix_cache
    assert cache is not None
    return cache.blocks.num_saved_tokens


def statistics_of(engine: Engine, prompt: Prompt) -> torch.Tensor:
    """Return `[layers, blocks, heads, fields]` of the blocks that are found."""
    ids = engine.cached_blocks(prompt)
    return torch.stack([statistics_view(cache)[ids] for cache in engine.kv_caches])


def test_answers_are_those_without_a_hit(tiny_llama: Path, engine: Engine) -> None:
    found = engine.generate_one_by_one(PROMPTS, SHORT)
    assert saved_tokens(engine) == 3 * SHARED
    # at once, while others write
    crowd = engine.generate(PROMPTS, SHORT)
    # rows of a step that share a block add to its statistics at the same time
    assert statistics_of(engine, HEADER).isfinite().all()
    # up to the first eviction, for those that come to it
    long = engine.generate(PROMPTS, LONG)
    with running_engine(tiny_llama, SMALL_BUDGET) as without:
        expected = without.generate_one_by_one(PROMPTS, SHORT)
        expected_long = without.generate_one_by_one(PROMPTS, LONG)
    assert found == crowd == expected
    before = 128 - NUM_READ
    assert [answer[:before] for answer in long] == [
        answer[:before] for answer in expected_long
    ]


def test_statistics_are_of_all_queries_over_a_block(engine: Engine) -> None:
    """What a later eviction rests on: the mean over all of them, whoever asked."""
    engine.generate([PROMPTS[0]], SHORT)
    # the last token is written and not read
    first = NUM_READ + SHORT - 1
    statistics = statistics_of(engine, HEADER)
    assert (statistics[:, 0, :, NUM_QUERIES] == first).all()
    # who shares adds to them
    engine.generate([PROMPTS[1]], SHORT)
    both = first + NUM_READ - SHARED + SHORT - 1
    after = statistics_of(engine, HEADER)
    assert (after[:, 0, :, NUM_QUERIES] == both).all()
    assert (after[:, 1, :, NUM_QUERIES] == both - 16).all()
    assert (after[..., MASS_SUM] >= statistics[..., MASS_SUM]).all()
    assert (after[..., MASS_PEAK] >= statistics[..., MASS_PEAK]).all()
    # who will evict takes them with him, and leaves these as they are
    engine.generate([PROMPTS[2]], LONG)
    torch.testing.assert_close(statistics_of(engine, HEADER), after, rtol=0, atol=0)
    assert saved_tokens(engine) == 2 * SHARED


def test_a_search_over_beams_reads_its_prompt_once(engine: Engine) -> None:
    """Each beam's next token is a request of its own, in vLLM."""
    prompt = PROMPTS[0]
    engine.generate([prompt], 1)
    beams = [prompt] * 4
    before = saved_tokens(engine)
    for length in range(6):
        tokens = engine.generate(beams, 1)
        # as different as beams are
        beams = [
            (*beam, (written[0] + number) % 50)
            for number, (beam, written) in enumerate(zip(beams, tokens, strict=True))
        ]
        saved = saved_tokens(engine) - before
        assert saved >= (length + 1) * 4 * 64
