# SPDX-License-Identifier: Apache-2.0
"""Images are tokens like others, and blocks of them come and go like others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.engine.engines import Engine, running_engine
from tests.engine.image_models import (
    IMAGE_TOKEN,
    NUM_IMAGE_TOKENS,
    NUM_WORDS,
    random_image,
    save_tiny_idefics3,
)
from tests.engine.steps import (
    Steps,
    audited_manager,
    most_held_blocks,
    poisoned_free_blocks,
)
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt

pytestmark = pytest.mark.engine

NOBODY_REACHES = replace(SMALL_BUDGET, budget=1024)
NUM_NEW = 40
TEXT_BEFORE = (40, 120)
"""Tokens; both images lie across the end of a chunk."""
TEXT_BEHIND = 90
ARGUMENTS: dict[str, Any] = dict(
    skip_tokenizer_init=False, limit_mm_per_prompt={"image": 1}
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_idefics3(tmp_path_factory.mktemp("tiny-idefics3"))


def tell(engine: Engine, seeds: tuple[int, ...] = (0, 1)) -> list[tuple[int, ...]]:
    """Return what is said to images with text before and behind them."""
    outputs = engine.llm.generate(
        [
            {
                "prompt_token_ids": [
                    *_words(before, seed=before),
                    IMAGE_TOKEN,
                    *_words(TEXT_BEHIND, seed=0),
                ],
                "multi_modal_data": {"image": random_image(seed)},
            }
            for before, seed in zip(TEXT_BEFORE, seeds, strict=True)
        ],
        SamplingParams(
            temperature=0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False
        ),
        use_tqdm=False,
    )
    for before, output in zip(TEXT_BEFORE, outputs, strict=True):
        assert len(output.prompt_token_ids) == before + NUM_IMAGE_TOKENS + TEXT_BEHIND
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def _words(length: int, seed: int) -> list[int]:
    return [token % NUM_WORDS for token in random_prompt(length, seed=seed)]


def test_below_the_budget_the_tokens_are_stock_vllms(tiny_model: Path) -> None:
    # the least that RoCo takes, so that prompts are read in several steps
    arguments = {**ARGUMENTS, "max_num_seqs": 2, "max_num_batched_tokens": 66}
    with running_engine(tiny_model, None, **arguments) as engine:
        expected = tell(engine)
        assert tell(engine, (2, 3)) != expected, "the images do not matter"
    with (
        running_engine(tiny_model, NOBODY_REACHES, **arguments) as engine,
        audited_manager(engine) as steps,
    ):
        assert tell(engine) == expected
        assert engine.manager.num_freed_blocks == 0
    assert_images_are_split(steps)


def test_evicting(tiny_model: Path) -> None:
    with (
        running_engine(tiny_model, SMALL_BUDGET, **ARGUMENTS) as engine,
        audited_manager(engine) as steps,
    ):
        found = tell(engine)
        assert tell(engine, (2, 3)) != found
        with poisoned_free_blocks(engine):
            assert tell(engine) == found
        assert engine.manager.num_freed_blocks > 0
        assert engine.num_lost_blocks == 0
        assert steps.peak_held_blocks <= most_held_blocks(SMALL_BUDGET, 1)
    assert_images_are_split(steps)


def test_images_that_must_stay_whole_are_refused(tiny_model: Path) -> None:
    """They were split all the same, without a word."""
    arguments = {**ARGUMENTS, "disable_chunked_mm_input": True}
    with (
        pytest.raises(ValueError, match="roco: disable_chunked_mm_input = True"),
        running_engine(tiny_model, SMALL_BUDGET, **arguments),
    ):
        pass


def assert_images_are_split(steps: Steps) -> None:
    """Check that a chunk of each request ended inside its image."""
    ends: dict[str, list[int]] = {}
    for step in steps.scheduled:
        for name, num_tokens in step.items():
            own = ends.setdefault(name, [0])
            own.append(own[-1] + num_tokens)
    # several rounds of the same requests
    for number, own in enumerate(ends.values()):
        before = TEXT_BEFORE[number % len(TEXT_BEFORE)]
        assert any(before < end < before + NUM_IMAGE_TOKENS for end in own)
