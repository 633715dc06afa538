# SPDX-License-Identifier: Apache-2.0
"""With `agree`, tensor-parallel ranks keep what one rank with all heads keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.engines import roco_arguments, running_engine
from tests.engine.kept_positions import Positions, recorded_positions
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt, save_tiny_model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.usefixtures("engine_lock"),
]

# the last one's first eviction comes at 128 tokens, when it writes
PROMPTS = [random_prompt(length, seed=length) for length in (300, 240, 150, 110)]
# requests of one batch differ in what they shield by
OPTIONS = [
    {"roco_shield": shield, "roco_shield_ratio": ratio}
    for shield, ratio in (
        ("contribution", 1.0),
        ("peak", 0.7),
        ("deviation", 0.5),
        ("contribution", 0.5),
    )
]
NUM_NEW = 32
"""Enough for each to evict while it writes."""


def run(
    model: Path, ranks: int, **options: Any
) -> tuple[list[tuple[int, ...]], list[list[Positions]]]:
    """Return what is generated, and what each rank has kept of each request."""
    server = roco_arguments(SMALL_BUDGET)["additional_config"]["roco"] | options
    with running_engine(
        model,
        SMALL_BUDGET,
        additional_config={"roco": server},
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else None,
    ) as engine:
        with recorded_positions(engine) as recorded:
            tokens = engine.generate(PROMPTS, NUM_NEW, extra_args=OPTIONS)
        assert engine.num_lost_blocks == 0
    kept = [recorded[tuple(prompt)] for prompt in PROMPTS]
    assert [len(of_ranks) for of_ranks in kept] == [ranks] * len(PROMPTS)
    return tokens, kept


def test_two_ranks_keep_what_one_does(tiny_llama: Path) -> None:
    tokens, kept = run(tiny_llama, 1)
    tokens_of_two, kept_by_two = run(tiny_llama, 2)
    assert kept_by_two == [of_one * 2 for of_one in kept]
    assert tokens_of_two == tokens


def test_ranks_that_do_not_agree(tiny_llama: Path) -> None:
    """Each keeps what its own heads need: the option says what is done."""
    _, kept = run(tiny_llama, 2, agree=False)
    assert all(len(one) == len(other) for one, other in kept)
    assert any(one != other for one, other in kept)


def test_ranks_that_share_a_kv_head(tmp_path: Path) -> None:
    """Each measures it by its own query heads, and all choose alike still."""
    _, kept = run(save_tiny_model("llama-mqa", tmp_path), 2)
    assert all(one == other for one, other in kept)
