# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the scheduler's side run, whatever the clock says."""

from __future__ import annotations

import pytest

from benchmarks import test_manager_benchmark as manager_benchmark
from benchmarks.serving import scheduling
from benchmarks.serving.scheduling import Case


def test_rows_of_the_managers_benchmark_are_freed() -> None:
    """The manager refused them: they had neither RoCo's scheduler nor its bound."""
    manager_benchmark.nothing_due(10_000)()
    strides = (10_000 - manager_benchmark.BUDGET_BLOCKS) // 512
    assert len(manager_benchmark.free_strides(512)) == 10 * strides


@pytest.mark.parametrize("short_of", ["tokens", "blocks"])
@pytest.mark.parametrize("roco", [False, True])
def test_prompts_wait_for_what_the_case_says(
    roco: bool, short_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "DECODE_STEPS", 20)
    case = Case(running=24, waiting=3, short_of=short_of)
    steps = list(scheduling.samples(case, roco=roco))
    assert len(steps) == 20
    assert all(schedule > 0 for schedule, _ in steps)


def test_prompts_that_do_not_wait_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "DECODE_STEPS", 2)
    with pytest.raises(RuntimeError, match="some did not wait"):
        list(scheduling.samples(Case(running=2, waiting=2), roco=False))
