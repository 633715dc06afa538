# SPDX-License-Identifier: Apache-2.0
"""Requests that the benchmark gives options do the same work as those without."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.benchmarks import throughput
from vllm.engine.arg_utils import EngineArgs

from benchmarks.rows import write
from benchmarks.serving.engines import MODELS, Engine, Requests
from benchmarks.serving.jobs import MACHINE
from benchmarks.serving.request_options import (
    CASES,
    MARGIN,
    MOST_REQUESTS,
    NUM_STEPS,
    SERVER,
    SIDES,
    Case,
    columns,
    summary,
)
from benchmarks.serving.tables import tables
from benchmarks.serving.vllm_bench import parsed
from benchmarks.specs import BLOCK_SIZE
from vllm_roco.config import NAMESPACE, RocoConfig
from vllm_roco.eviction_row import EvictionRow
from vllm_roco.request_options.planner import RequestPlanner

PLANNER = RequestPlanner(SERVER, BLOCK_SIZE)
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def engine_of(case: Case) -> Engine:
    """Return the engine of a benchmark of one case."""
    batch = Requests(MOST_REQUESTS, case.input_len, NUM_STEPS + MARGIN)
    return Engine(model="smollm2-135m", batches=(batch,), roco=SERVER)


def rows_of(case: Case, side: str) -> list[EvictionRow]:
    """Return the rows of a side's requests."""
    return [
        PLANNER.plan({NAMESPACE: options}, case.input_len).row
        for options in case.options_of(side, MOST_REQUESTS)
    ]


@EACH_CASE
def test_a_side_has_the_rows_that_it_is_called_by(case: Case) -> None:
    default = PLANNER.plan(None, case.input_len).row
    assert set(rows_of(case, "none")) == {default}
    assert len({default, *rows_of(case, "equal")}) == 2
    assert len({default, *rows_of(case, "different")}) == 1 + MOST_REQUESTS


@EACH_CASE
def test_all_rows_evict_alike(case: Case) -> None:
    last = case.input_len + NUM_STEPS + MARGIN
    evicted = {
        tuple(
            row.schedule(BLOCK_SIZE).evicted_blocks(length)
            for length in range(case.input_len, last)
        )
        for side in SIDES
        for row in rows_of(case, side)
    }
    ((first, *_, end),) = evicted
    assert (end > first > 0) == (case.input_len > SERVER.budget)
    assert (end == 0) == (case.input_len < SERVER.budget)


@EACH_CASE
def test_vllm_understands_what_the_engine_is_told(case: Case) -> None:
    command = engine_of(case).command([f"--tokenizer={MODELS}", "--async-scheduling"])
    arguments = EngineArgs.from_cli_args(parsed(throughput, command))
    assert RocoConfig.from_additional_config(arguments.additional_config) == SERVER
    assert not arguments.disable_log_stats
    assert arguments.async_scheduling


def test_a_ratio_is_of_one_round() -> None:
    """The second round was on a slower clock, which says nothing of the sides."""
    rounds = [
        {"none": 0.9 * slow, "equal": slow, "different": 1.1 * slow}
        for slow in (1000.0, 2000.0, 4000.0)
    ]
    found = summary(rounds)
    assert found["different"]["step_us"] == 2200
    assert found["different"]["rounds"] == 3
    for side, ratio in ("none", 0.9), ("equal", 1), ("different", 1.1):
        names = ("ratio", "ratio_low", "ratio_high")
        assert [found[side][name] for name in names] == [ratio] * 3


def test_the_table_shows_the_newest_code(tmp_path: Path) -> None:
    measured = summary([{"none": 4990.0, "equal": 5000.0, "different": 5010.0}])
    machine = dict.fromkeys(MACHINE, "")
    case = CASES[0]
    write(
        tmp_path / "request_options.csv",
        [
            {**machine, "gpu": "a GPU", "commit": commit}
            | columns(engine_of(case), case, side, MOST_REQUESTS)
            | measured[side]
            for commit in ("old", "new")
            for side in SIDES
        ],
    )
    caption, _, *lines = tables(tmp_path)["request_options"].splitlines()
    assert caption.startswith("a GPU, ") and "commit new" in caption
    assert len(lines) == 2 + len(SIDES)
    cells = [cell.strip() for cell in lines[-1].split("|")]
    assert cells[3:5] == ["different", "5,010 (5,010 to 5,010)"]
    assert cells[5] == "1.002 (1.002 to 1.002)"
