# SPDX-License-Identifier: Apache-2.0
"""Beams, whose every token is a request, find what the one before has read."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.sampling_params import BeamSearchParams

from tests.engine.engines import Engine, running_engine
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt

pytestmark = pytest.mark.engine

WIDTH = 4
NUM_NEW = 6


def beams(engine: Engine, num_tokens: int) -> list[list[int]]:
    """Return all tokens of each beam, the best first."""
    (output,) = engine.llm.beam_search(
        [{"prompt_token_ids": list(random_prompt(num_tokens, seed=1))}],
        BeamSearchParams(beam_width=WIDTH, max_tokens=NUM_NEW, ignore_eos=True),
    )
    return [sequence.tokens for sequence in output.sequences]


@pytest.mark.parametrize(
    ("num_tokens", "hit"),
    [(100, 96), (400, 384)],
    ids=["to the last block", "past an eviction to the last chunk"],
)
def test_beams_begin_behind_their_prompt(
    tiny_llama: Path, smollm2: Path, num_tokens: int, hit: int
) -> None:
    tokenizer = dict(tokenizer=str(smollm2), skip_tokenizer_init=False)
    with running_engine(tiny_llama, SMALL_BUDGET, **tokenizer) as engine:
        expected = beams(engine, num_tokens)
    with running_engine(
        tiny_llama, SMALL_BUDGET, enable_prefix_caching=True, **tokenizer
    ) as engine:
        found = beams(engine, num_tokens)
        cache = engine.manager.prefix_cache
        assert cache is not None
        counts = cache.counts()
        assert engine.num_lost_blocks == 0
    assert found == expected
    # the first token is one request, each of the others one of each beam
    num_behind = WIDTH * (NUM_NEW - 1)
    assert counts.block_hits + counts.snapshot_hits == num_behind
    assert counts.saved_tokens == num_behind * hit
