# SPDX-License-Identifier: Apache-2.0
"""Kernels of a trace are counted in the step that they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile
from vllm.benchmarks import latency
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname

from benchmarks.serving import profiling, scheduling
from benchmarks.serving.engines import MODELS
from benchmarks.serving.jobs import Session
from benchmarks.serving.profiling import (
    MAX_NUM_BATCHED_TOKENS,
    kernel_rows,
    our_kernels,
    profile_command,
    run,
    split,
)
from benchmarks.serving.trace_steps import decode_steps
from benchmarks.serving.vllm_bench import parsed

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
        # while a kernel runs
        add("gpu_memset", "Memset", start + 10, 5, tid=8)
        add("user_annotation", "scheduler: schedule", start + 40, 3, tid=9)
        add("user_annotation", "scheduler: update_from_output", start + 50, 4, tid=9)
        add("user_annotation", "another's", start + 50, 4, tid=9)
    return {"traceEvents": events}


def test_steps_and_shares() -> None:
    parts = split(decode_steps(trace([2, 2, 80, 2, 2]), batch=2))
    assert [len(part.times) for part in parts.values()] == [3, 1]
    ordinary, evicting = (kernel_rows(part) for part in parts.values())
    assert ordinary[["kernel", "ours", "calls", "us"]].to_numpy().tolist() == [
        ["gemm", "no", 2, 60],
        ["gpu_memset", "no", 1, 5],
        ["_move_blocks_kernel", "yes", 1, 2],
        ["gpu_memcpy", "no", 1, 2],
    ]
    # of five digits each
    assert ordinary["share"].sum() == pytest.approx(1, abs=2e-5)
    assert evicting["kernel"][0] == "_move_blocks_kernel"
    assert evicting["share"][0] == pytest.approx(80 / 147, abs=1e-5)


def test_kernels_beyond_the_first_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "TOP", 1)
    found = kernel_rows(decode_steps(trace([2, 2]), batch=2))
    assert found[["kernel", "calls", "us"]].to_numpy().tolist() == [
        ["gemm", 2, 60],
        # ours have a row in any case
        ["_move_blocks_kernel", 1, 2],
        ["2 others", 2, 7],
    ]
    assert found["share"].sum() == pytest.approx(1, abs=2e-5)


def test_idle_time_and_the_scheduler() -> None:
    parts = split(decode_steps(trace([2, 2, 80, 2, 2]), batch=2))
    # the long move ends in the next step, beside that one's first kernels
    assert [part.times.mean().to_dict() for part in parts.values()] == [
        {
            "step_us": 100,
            "idle_us": pytest.approx((36 + 36 + 34) / 3),
            "scheduler_us": 7,
        },
        {"step_us": 100, "idle_us": 4, "scheduler_us": 7},
    ]


def test_a_trace_without_the_scheduler_tells_no_time() -> None:
    events = trace([2, 2])["traceEvents"]
    others = [event for event in events if event.get("cat") != "user_annotation"]
    times = decode_steps({"traceEvents": others}, batch=2).times
    assert times["idle_us"].tolist() == [36]
    assert times["scheduler_us"].isna().all()


@pytest.mark.parametrize("roco", [False, True])
def test_the_scheduler_shows_in_traces(tmp_path: Path, roco: bool) -> None:
    kind = profiling.SCHEDULERS[roco]
    core = scheduling.scheduler(roco=roco, kind=kind)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        output = core.schedule()
        core.update_from_output(output, scheduling.answer(core, output))
    core.shutdown()
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    assert [e["name"] for e in events if e.get("cat") == "user_annotation"] == [
        "scheduler: schedule",
        "scheduler: update_from_output",
    ]


def test_nothing_begins_after_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Session(tmp_path, {}, time_limit=-1), ["stock"], [])
    assert "no time left: stock" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_the_steps_that_are_asked_for() -> None:
    with pytest.raises(ValueError, match="no step.*generation_3"):
        decode_steps(trace([2]), batch=3)


def test_our_kernels() -> None:
    assert {"attend_kernel", "_score_kernel", "_move_blocks_kernel"} <= our_kernels()


@pytest.mark.parametrize("variant", ["stock", "roco"])
def test_command(variant: str, tmp_path: Path) -> None:
    command = profile_command(variant, tmp_path, [f"--tokenizer={MODELS}"])
    arguments = parsed(latency, command)
    assert arguments.profile
    engine = EngineArgs.from_cli_args(arguments)
    assert engine.profiler_config.torch_profiler_dir == str(tmp_path)
    assert engine.async_scheduling
    kind = resolve_obj_by_qualname(engine.scheduler_cls)
    assert kind is profiling.SCHEDULERS[variant == "roco"]
    assert engine.max_num_batched_tokens == MAX_NUM_BATCHED_TOKENS
