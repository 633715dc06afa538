# SPDX-License-Identifier: Apache-2.0
"""Prefixes of models of which some layers have a sliding window: hits change nothing.

The pages that are compared are those of the layers that evict; they stand behind layers
with a window.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.outputs import RequestOutput

from tests.engine.engines import Engine, Prompt, roco_arguments, running_engine
from tests.engine.final_pages import Ending
from tests.engine.mixed_models import save_mixed
from tests.engine.prefix_hits import (
    DONOR,
    LAST,
    NUM_NEW,
    assert_whole,
    check_crowd,
    check_one_by_one,
    without_hits,
)
from tests.engine.tiny_models import SMALL_BUDGET
from vllm_roco.kv_cache.window_manager import WindowManager
from vllm_roco.scheduler import RocoAsyncScheduler

pytestmark = pytest.mark.engine

# vLLM's attention for CPUs has blocks of a multiple of 32 tokens
BUDGET = replace(SMALL_BUDGET, block_size=32)
ROWS: list[dict[str, Any] | None] = [
    None,
    {"roco_budget": 128},
    {"roco_budget": 160, "roco_chunk": 32},
    {"roco_mode": "generation"},
    {"roco_budget": "full"},
]
"""Options of requests, of which none may have another's snapshots past an eviction."""


# shorter than a chunk of 64 tokens, longer, and never left
@pytest.fixture(scope="module", params=[40, 150, 1000])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    # two layers of each kind: the caches of a single one would be all of the memory
    folder = tmp_path_factory.mktemp("gemma2")
    return save_mixed("gemma2", folder, sliding_window=request.param)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, Ending]:
    return without_hits(model, BUDGET)


def test_one_by_one(model: Path, expected: dict[str, Ending]) -> None:
    with running_engine(model, BUDGET, enable_prefix_caching=True) as engine:
        managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
        assert [type(manager) is WindowManager for manager in managers].count(True) == 1
        check_one_by_one(engine, expected)


@pytest.mark.parametrize("pool", [512, 46], ids=["large-pool", "small-pool"])
def test_all_at_once_asynchronously(
    model: Path, expected: dict[str, Ending], pool: int, asynchronous: None
) -> None:
    check_crowd(model, BUDGET, expected, pool, RocoAsyncScheduler)


def outputs_of(engine: Engine, prompt: Prompt, row: Any) -> RequestOutput:
    (output,) = engine.run([prompt], NUM_NEW, extra_args=[row], logprobs=2)
    return output


def test_rows_have_snapshots_of_their_own(tmp_path: Path) -> None:
    """What a window holds depends on what was evicted in front of it."""
    model = save_mixed("gemma2", tmp_path)
    server = roco_arguments(BUDGET)["additional_config"]["roco"]
    server |= {"max_budget": 512, "allow_full": True}
    arguments: dict[str, Any] = {"additional_config": {"roco": server}}
    with running_engine(model, BUDGET, **arguments) as engine:
        expected = [outputs_of(engine, DONOR, row) for row in ROWS]
    with running_engine(
        model, BUDGET, enable_prefix_caching=True, **arguments
    ) as engine:
        first = [outputs_of(engine, DONOR, row) for row in ROWS]
        again = [outputs_of(engine, DONOR, row) for row in ROWS]
        assert_whole(engine)
    tokens = {tuple(output.outputs[0].token_ids) for output in expected}
    assert len(tokens) > 2, "choose a prompt that is told apart"
    # two part before they evict, and others begin there; nobody measures the last one
    assert [output.num_cached_tokens for output in first] == [0, 0, 64, 128, 0]
    assert [output.num_cached_tokens for output in again] == [LAST] * len(ROWS)
    for found in (first, again):
        for output, other in zip(found, expected, strict=True):
            assert output.outputs[0].token_ids == other.outputs[0].token_ids
            assert_same_logprobs(output, other)


def assert_same_logprobs(output: RequestOutput, expected: RequestOutput) -> None:
    for found, other in zip(
        output.outputs[0].logprobs or (),
        expected.outputs[0].logprobs or (),
        strict=True,
    ):
        assert found.keys() == other.keys()
        for token, logprob in found.items():
            # before a first eviction other places where steps end round differently
            assert logprob.logprob == pytest.approx(other[token].logprob, abs=1e-4)
