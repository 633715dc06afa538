# SPDX-License-Identifier: Apache-2.0
"""Tokens and kept blocks on a GPU are the independent oracle's, which runs on the CPU.

The CPU implementation is held to the same oracle (`tests/engine`), so both keep the
same blocks. Graphs, scheduling and what lies in freed blocks must make no difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.engine.agreement import assert_agreement
from tests.engine.steps import poisoned_free_blocks
from tests.engine.tiny_models import TINY_BUDGET, random_prompt
from tests.gpu.engines import EAGER, FULL_GRAPHS, PIECEWISE_GRAPHS, gpu_engine
from tests.gpu.kept_blocks import recorded_kept_blocks
from tests.oracle import Options, OracleResult, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

PROMPTS = [random_prompt(length, seed=length) for length in (230, 33, 129, 80)]
NUM_NEW = 104

RUNS: dict[str, dict[str, Any]] = {
    "eager": dict(EAGER, async_scheduling=False),
    "full-graphs": dict(FULL_GRAPHS, async_scheduling=False),
    "full-graphs-async": dict(FULL_GRAPHS, async_scheduling=True),
    "piecewise-graphs-async": dict(PIECEWISE_GRAPHS, async_scheduling=True),
}


SHIELDS = {
    "contribution": replace(TINY_BUDGET, shield="contribution", shield_ratio=1),
    "peak": TINY_BUDGET,
}


@pytest.fixture(scope="module", params=SHIELDS)
def options(request: pytest.FixtureRequest) -> Options:
    return SHIELDS[request.param]


@pytest.fixture(scope="module")
def expected(
    options: Options, tiny_llama_for_oracle: PreTrainedModel
) -> list[OracleResult]:
    return [
        generate(tiny_llama_for_oracle, prompt, options, NUM_NEW) for prompt in PROMPTS
    ]


@pytest.mark.parametrize("run", RUNS)
def test_graphs_and_scheduling(
    run: str, options: Options, tiny_llama: Path, expected: list[OracleResult]
) -> None:
    with gpu_engine(tiny_llama, options, **RUNS[run]) as engine:
        with recorded_kept_blocks(engine) as kept:
            together = engine.generate(PROMPTS, NUM_NEW)
        assert_agreement(PROMPTS, together, kept, expected)
        with poisoned_free_blocks(engine), recorded_kept_blocks(engine) as kept:
            poisoned = engine.generate(PROMPTS, NUM_NEW)
        assert_agreement(PROMPTS, poisoned, kept, expected)
        assert engine.num_lost_blocks == 0


def test_no_step_waits_for_the_device(
    options: Options,
    tiny_llama: Path,
    expected: list[OracleResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Building the metadata and running a layer read nothing back on the host."""
    # not at the top: a machine without a GPU collects these tests too
    from vllm_roco.attention.cuda.impl import RocoCudaImpl
    from vllm_roco.attention.cuda.metadata import RocoCudaMetadataBuilder

    watched = {name: 0 for name in ("build", "forward", "do_kv_cache_update")}

    def watch(owner: type, name: str) -> None:
        function = getattr(owner, name)

        def watching(*args: Any, **kwargs: Any) -> Any:
            watched[name] += 1
            with _synchronising_is_an_error():
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, watching)

    with gpu_engine(tiny_llama, options, **EAGER) as engine:
        # what is compiled or bound on first use has been by then
        engine.generate(PROMPTS, NUM_NEW)
        watch(RocoCudaMetadataBuilder, "build")
        watch(RocoCudaImpl, "forward")
        watch(RocoCudaImpl, "do_kv_cache_update")
        tokens = engine.generate(PROMPTS, NUM_NEW)
    assert tokens == [oracle.token_ids for oracle in expected]
    assert min(watched.values()) > NUM_NEW


@contextlib.contextmanager
def _synchronising_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
