# SPDX-License-Identifier: Apache-2.0
"""Kernels of a trace are counted in the step that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from vllm.benchmarks import latency
from vllm.engine.arg_utils import EngineArgs

from benchmarks.serving.profiling import (
    REQUESTS,
    decode_steps,
    kernel_rows,
    our_kernels,
    profile_command,
    split,
)
from benchmarks.serving.vllm_bench import Options, parsed

PREFILL = "execute_context_2(700)_generation_0(0)"
DECODE = "execute_context_0(0)_generation_2(2)"


def trace(moves: list[float]) -> Mapping[str, Any]:
    """Return a prompt's step and one decode step for each time of the moves."""
    events: list[dict[str, object]] = [{"name": "process_name", "ph": "M"}]

    def add(cat: str, name: str, ts: float, dur: float, tid: int = 7) -> None:
        events.append({"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid})

    for index, move in enumerate([9.0, *moves]):
        name = DECODE if index else PREFILL
        start = 100.0 * index
        add("gpu_user_annotation", name, start, 50)
        # on another stream; not where the step begins
        add("gpu_user_annotation", name, start - 20, 5, tid=8)
        add("kernel", "gemm", start + 1, 30)
        add("kernel", "gemm", start + 32, 30)
        add("kernel", "_move_blocks_kernel", start + 64, move)
        # sampling follows behind the annotation
        add("gpu_memcpy", "Memcpy DtoH", start + 90, 2, tid=8)
    return {"traceEvents": events}


def test_steps_and_shares() -> None:
    parts = split(decode_steps(trace([2, 2, 80, 2, 2]), batch=2))
    assert [len(part) for part in parts.values()] == [3, 1]
    ordinary, evicting = (kernel_rows(part) for part in parts.values())
    assert [(row["kernel"], row["calls"], row["us"]) for row in ordinary] == [
        ("gemm", 2, 60),
        ("_move_blocks_kernel", 1, 2),
        ("gpu_memcpy", 1, 2),
    ]
    assert [row["ours"] for row in ordinary] == ["no", "yes", "no"]
    assert sum(float(str(row["share"])) for row in ordinary) == pytest.approx(1)
    assert evicting[0]["kernel"] == "_move_blocks_kernel"
    assert evicting[0]["share"] == pytest.approx(80 / 142, abs=1e-5)


def test_without_the_steps_that_are_asked_for() -> None:
    with pytest.raises(ValueError, match="no step.*generation_3"):
        decode_steps(trace([2]), batch=3)


def test_our_kernels() -> None:
    assert {"attend_kernel", "_score_kernel", "_move_blocks_kernel"} <= our_kernels()


@pytest.mark.parametrize("variant", ["stock", "roco"])
def test_command(variant: str, tmp_path: Path) -> None:
    models = str(Path(__file__).parents[2] / "benchmarks" / "models")
    command = profile_command(variant, tmp_path, Options(tokenizer=models))
    arguments = parsed(latency, command)
    assert arguments.profile
    engine = EngineArgs.from_cli_args(arguments)
    assert engine.profiler_config.torch_profiler_dir == str(tmp_path)
    assert engine.max_num_batched_tokens == 512 * REQUESTS.count
