# SPDX-License-Identifier: Apache-2.0
"""The grid holds what has to be shown, and a run goes on where it stopped."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import jobs, results, scoring
from benchmarks.quality.cells import PERPLEXITY, PERPLEXITY_GENERATION, Cell, Job
from benchmarks.quality.grid import BASE, FULL, METHODS, ORACLE_METHODS, cells
from benchmarks.quality.grid import jobs as jobs_of
from benchmarks.quality.pace import chunk_of
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.results import Result
from benchmarks.quality.run import can_be_swept, run
from benchmarks.quality.tasks import FIRST_REPORT_SEED
from benchmarks.quality.tasks.derivation import prompt_tokens
from benchmarks.quality.with_oracle import method_of
from benchmarks.quality.with_vllm import asked_of, engine_arguments
from benchmarks.quality.worker import accuracies
from benchmarks.rows import read
from vllm_roco.config import RocoConfig
from vllm_roco.request_options.planner import RequestPlan, RequestPlanner

FULL_PRESET = PRESETS["full"]


def grid(preset: str = "full") -> list[Cell]:
    return cells(PRESETS[preset], model="m", seed=FIRST_REPORT_SEED, n=None)


def test_every_cell_is_there_once_and_can_be_written() -> None:
    for preset in PRESETS:
        every = grid(preset)
        assert len(set(every)) == len(every)
        assert [Cell.from_json(cell.to_json()) for cell in every] == every


@pytest.mark.parametrize(
    ("task", "context", "ratios"),
    [
        ("passkey", 2048, {0.5, 0.25, 0.125, 0.0625}),
        ("passkey", 4096, {0.5, 0.25, 0.125, 0.0625}),
        ("needle", 1024, {0.5, 0.25, 0.125}),
        ("needle", 2048, {0.5, 0.25, 0.125}),
        (PERPLEXITY, 2048, {0.5, 0.25, 0.125}),
    ],
)
def test_every_method_meets_the_same_budgets_on_a_hundred_problems(
    task: str, context: int, ratios: set[float]
) -> None:
    for method in (*METHODS, *ORACLE_METHODS):
        found = {
            cell.budget_ratio
            for cell in grid()
            if (cell.task, cell.context) == (task, context)
            and cell.setup.method == method
            and cell.setup.chunk == min(BASE.chunk, cell.setup.budget)
            and cell.setup.stride == min(BASE.stride, cell.setup.budget)
            and cell.n >= 100
        }
        assert found == ratios, method


def test_strides_are_swept_with_chunks_of_their_own_and_of_one_length() -> None:
    chunks: dict[str, set[tuple[int, int]]] = {}
    for cell in grid():
        setup = cell.setup
        is_swept = cell.task == "passkey" and cell.budget_ratio == 0.125
        if is_swept and cell.context == 2048 and setup.method == "roco/peak":
            kind = "own" if setup.chunk == setup.stride else "same"
            chunks.setdefault(kind, set()).add((setup.stride, setup.chunk))

    strides = (16, 32, 64, 128, 256, 512)
    assert chunks["own"] == {(stride, stride) for stride in strides}
    assert chunks["same"] >= {(stride, 512) for stride in strides[:-1]}


def test_texts_read_as_if_generated_are_read_up_to_the_next_eviction() -> None:
    read = [cell.setup for cell in grid() if cell.task == PERPLEXITY_GENERATION]

    assert read[0] == FULL
    for setup in read[1:]:
        assert setup.chunk == setup.stride
        assert setup.budget % setup.chunk == 0


def test_a_job_has_one_engine_and_the_full_cache_comes_first() -> None:
    every = jobs_of(grid())

    assert sum(len(job) for job in every) == len(grid())
    assert every[0][0].setup == FULL
    for job in every:
        if job[0].setup.engine == "vllm":
            assert len({cell.setup for cell in job}) == 1
        assert len({cell.setup.engine for cell in job}) == 1


def test_hard_tasks_have_every_method_and_conversations_that_are_kept() -> None:
    hard = grid("hard")
    lists = {("niah_multikey_2", 4096), ("vt", 2048), ("cwe", 4096)}
    asked_again = {("multikey, 2 questions", 2048), ("needle, 4 questions", 2048)}
    for task, context in lists | asked_again:
        found = {
            (cell.setup.method, cell.budget_ratio)
            for cell in hard
            if (cell.task, cell.context) == (task, context)
        }
        methods = {*METHODS, "token-roco", "tova", "h2o", "random"}
        if (task, context) in asked_again:
            methods |= {f"{method}, kept" for method in METHODS}
        assert found == {
            ("full", 1.0),
            *((method, ratio) for method in methods for ratio in (0.5, 0.25)),
            *((method, 0.125) for method in methods if (task, context) in lists),
        }
    kept = [cell.setup for cell in hard if cell.setup.method.endswith(", kept")]
    assert {setup.engine for setup in kept} == {"oracle"}
    assert {setup.block_size for setup in kept} == {16}


def test_scores_of_questions_stand_beside_their_mean() -> None:
    assert accuracies([[1.0], [0.0]]) == {"accuracy": [1.0, 0.0]}
    assert accuracies([[1.0, 0.5], [0.0, 0.5]]) == {
        "accuracy": [0.75, 0.25],
        "accuracy, question 1": [1.0, 0.0],
        "accuracy, question 2": [0.5, 0.5],
    }


def result(cell: Cell, *scores: float) -> Result:
    metric = "perplexity" if cell.task == PERPLEXITY else "accuracy"
    return Result(cell, {metric: list(scores)}, "gpu", "abc")


def test_what_requests_ask_for_shares_one_engine() -> None:
    asking = [job for job in jobs_of(grid("modes")) if job[0].setup != FULL]
    problems = [{(cell.task, cell.context) for cell in job} for job in asking]
    assert problems == [{("passkey", 2048)}, {("needle", 1024)}, {("needle", 2048)}]
    for job in asking:
        asked = {cell.setup.request for cell in job}
        assert (("budget", 0.25), ("mode", "prompt")) in asked
    arguments = engine_arguments(asking[0][0].setup, 2048)
    options = arguments["additional_config"]["roco"]
    assert "budget" not in options
    # mode "generation" keeps a prompt, and half of its length on top
    assert options["max_budget"] >= 2048 + 1024
    assert options["allow_full"]


def plan(served: dict[str, Any], asked: dict[str, Any], prompt: int) -> RequestPlan:
    planner = RequestPlanner(RocoConfig(**served), 16)
    return planner.plan(asked, prompt)


def test_hard_tasks_ask_one_server_for_every_method() -> None:
    asking = [
        job
        for job in jobs_of(grid("hard"))
        if job[0].setup.engine == "vllm" and job[0].setup != FULL
    ]
    first = [(job[0].task, job[0].context) for job in asking]
    assert len(set(first)) == len(first) == 17
    assert first[:3] == [("niah_multikey_2", 2048), ("vt", 2048), ("cwe", 2048)]
    for job in asking:
        found = [(cell.setup.method, cell.budget_ratio) for cell in job]
        assert found[:4] == [
            (method, ratio) for ratio in (0.5, 0.25) for method in METHODS[:2]
        ]
        assert {method for method, _ in found} == {*METHODS}
        # a server that is the same whichever cell it starts with
        servers = [engine_arguments(cell.setup, 2048) for cell in job]
        assert all(server == servers[0] for server in servers)
        for cell in job:
            setup = cell.setup
            asked = {f"roco_{name}": value for name, value in setup.request}
            assert asked.get("roco_shield", "") == setup.shield
            own = ["budget", "policy", "stride", "chunk"]
            own += ["shield", "shield_ratio"] if setup.shield else []
            alone = {name: getattr(setup, name) for name in own}
            # what a server of its own would do
            served = servers[0]["additional_config"]["roco"]
            assert plan(served, asked, cell.context) == plan(alone, {}, cell.context)


POLICIES_THERE = ("roco/contribution", "recent", "random")


def test_answers_that_need_themselves_hold_as_much_by_every_method() -> None:
    written = [cell for cell in grid("written") if cell.setup != FULL]
    held: dict[int, list[str]] = {}
    for cell in written:
        if cell.context == 3072:
            held.setdefault(cell.setup.budget, []).append(cell.setup.method)
    methods = [f"{m}, {p}" for m in ("generation", "both") for p in POLICIES_THERE]
    assert list(held) == [1840, 1232, 928]
    assert all(
        sorted(found) == sorted([*methods, "generation, random by head"])
        for found in held.values()
    )
    for cell in written:
        setup, prompt = cell.setup, prompt_tokens(cell.context)
        if setup.engine == "oracle":
            rule = method_of(setup).rule
            assert (rule.scope, rule.unit, rule.second) == ("head", 1, "random")
            assert rule.sink >= prompt
            continue
        served = engine_arguments(setup, cell.context)["additional_config"]["roco"]
        (asked,) = asked_of(setup, [[1] * prompt])
        row = plan(served, asked, prompt)
        alone = {"policy": setup.policy, "budget": setup.budget}
        alone |= {"chunk": setup.chunk, "stride": setup.stride}
        if not setup.method.startswith("generation"):
            assert row == plan(alone, {}, prompt)
        else:
            assert row != plan(alone, {}, prompt)


def test_every_pace_has_the_same_peak() -> None:
    paces = [cell for cell in grid("pace") if cell.setup != FULL]
    prompts = [[i % 7 for i in range(2048)], list(range(2048))]
    chunks = {}
    for cell in paces:
        memory = cell.setup.budget
        easy, hard = asked_of(cell.setup, prompts)
        chunks[cell.setup.method] = easy["roco_chunk"], hard["roco_chunk"]
        served = engine_arguments(cell.setup, 2048)["additional_config"]["roco"]
        for asked in (easy, hard):
            assert set(asked) == {"roco_budget", "roco_chunk", "roco_stride"}
            assert sum(asked.values()) == memory
            assert plan(served, asked, 2048) == plan(
                {name.removeprefix("roco_"): asked[name] for name in asked}, {}, 2048
            )
    assert chunks.pop("at random")[0] in (128, 512)
    assert chunks == {
        **{str(chunk): (chunk, chunk) for chunk in (64, 128, 256, 512)},
        "long where easy": (512, 128),
        "long where hard": (128, 512),
    }
    every = jobs_of(paces)
    assert [len(job) for job in every] == [7] * 10
    with pytest.raises(ValueError, match="pace = 'slow' is not one of 64, 128"):
        chunk_of("slow", prompts[0])


def test_what_is_named_first_is_measured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Cell] = []

    def measure(job: Job, workplace: jobs.Workplace, until: float) -> str | None:
        asked.extend(job)
        for cell in job:
            results.append(workplace.results, result(cell, 1.0))
        return None

    monkeypatch.setattr(jobs, "_run_one", measure)
    given = arguments(tmp_path)
    given.preset, given.order, given.n = "full", "asked", 1
    given.tasks, given.methods = ["needle", "passkey"], ["random", "roco/peak", "h2o"]
    given.contexts, given.shares = [2048], [0.25, 0.5]
    run(given)

    found = [cell for cell in asked if cell.setup.engine == "oracle"]
    assert [
        (cell.task, cell.budget_ratio, cell.setup.method)
        for cell in found
        if cell.setup.chunk == 512
    ] == [
        (task, share, method)
        for task in given.tasks
        for share in given.shares
        for method in ("random", "h2o")
    ]
    assert {cell.context for cell in asked} == {2048}

    before = len(asked)
    again = arguments(tmp_path / "again")
    again.preset, again.n, again.tasks, again.contexts = "full", 1, ["needle"], [2048]
    again.methods, again.shares, again.known = (
        ["random"],
        [0.25],
        [tmp_path / "quality_results.jsonl"],
    )
    run(again)
    assert len(asked) == before, "what is known is not measured again"
    rows = read(tmp_path / "again" / "quality.csv")
    assert set(rows["task"]) == {"needle"}
    assert set(rows["method"]) == {"full", "random"}


def test_a_task_that_the_full_cache_fails_is_not_swept() -> None:
    full = next(cell for cell in grid() if cell.task == "vt")
    swept = next(c for c in grid() if c.task == "vt" and c.setup != FULL)

    assert not can_be_swept(swept, FULL_PRESET, {})
    assert can_be_swept(swept, PRESETS["screen"], {})
    for score, expected in ((0.29, False), (0.31, True)):
        done = {full: result(full, score)}
        assert can_be_swept(swept, FULL_PRESET, done) is expected


def arguments(out: Path) -> argparse.Namespace:
    return argparse.Namespace(
        preset="quick",
        model="m",
        n=2,
        seed=7,
        tasks=["passkey", PERPLEXITY],
        methods=None,
        contexts=None,
        shares=None,
        order="grid",
        known=[],
        at_once=False,
        parallel=1,
        time_limit=60.0,
        commit="abc",
        dry_run=False,
        out=out,
    )


def test_a_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that are there stay as they are, and only the others are measured."""
    asked: list[Cell] = []

    def measure(job: Job, workplace: jobs.Workplace, until: float) -> str | None:
        for cell in job:
            asked.append(cell)
            results.append(workplace.results, result(cell, 1.0, 0.5))
            if len(asked) == 5:
                return "the fifth cell is the last that is known"
        return None

    # an engine would take a minute; the real worker runs in the test below
    monkeypatch.setattr(jobs, "_run_one", measure)
    run(arguments(tmp_path))
    first = read(tmp_path / "quality.csv")
    before = len(asked)
    run(arguments(tmp_path))
    second = read(tmp_path / "quality.csv")

    assert len(first.merge(second)) == len(first)
    assert len(second) == len(asked) == len(set(asked)) > before
    assert {cell.setup for cell in asked[:2]} == {FULL}
    run(arguments(tmp_path))
    assert len(asked) == len(second)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_full_cache_is_waited_for_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """It solves nothing here, so that nothing else tells anything."""
    asked: list[Cell] = []

    def measure(job: Job, workplace: jobs.Workplace, until: float) -> str | None:
        asked.extend(job)
        for cell in job:
            results.append(workplace.results, result(cell, 0.0))
        return None

    monkeypatch.setattr(jobs, "_run_one", measure)
    given = arguments(tmp_path)
    given.at_once, given.tasks = at_once, ["passkey"]
    run(given)

    assert asked[0].setup == FULL
    assert (len(asked) > 1) is at_once


def test_a_failed_worker_is_named_with_its_log(tmp_path: Path) -> None:
    cell = replace(grid()[0], setup=replace(FULL, engine="abacus"))
    workplace = jobs.Workplace("m", "abc", tmp_path / "o.jsonl", tmp_path / "l")
    failures = [
        failure
        for batch in jobs.run([[cell]], workplace, parallel=1, until=float("inf"))
        for failure in batch
    ]

    (failure,) = failures
    log = Path(failure.rpartition("see ")[2])
    assert "with_abacus" in log.read_text()


def test_what_runs_at_the_time_limit_is_ended(tmp_path: Path) -> None:
    workplace = jobs.Workplace("m", "abc", tmp_path / "o.jsonl", tmp_path / "l")

    failures = list(
        jobs.run(jobs_of(grid()), workplace, parallel=2, until=float("-inf"))
    )

    assert not any(failures)
    assert not list((tmp_path / "l").iterdir())


def test_table_has_intervals_and_the_share_of_the_full_cache() -> None:
    every = grid()
    full = next(c for c in every if c.task == "passkey" and c.context == 2048)
    cell = next(
        c
        for c in every
        if c.task == "passkey" and c.context == 2048 and c.budget_ratio == 0.25
    )
    rows = scoring.rows(
        {
            full: result(full, *[1.0] * 90, *[0.0] * 10),
            cell: result(cell, *[1.0] * 45, *[0.0] * 55),
        }
    )

    row = rows.iloc[1]
    # Wilson's interval of 45 in 100
    assert row["score":"ci_high"].tolist() == [
        0.45,
        pytest.approx(0.3561, abs=1e-4),
        pytest.approx(0.5476, abs=1e-4),
    ]
    assert row["of_full"] == 0.5
    assert 0.35 < row["of_full_low"] < 0.45 < 0.55 < row["of_full_high"] < 0.65


def test_the_command_tells_what_it_would_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.quality", "run", "--preset", "full"),
            *("--out", str(tmp_path), "--model", "m", "--dry-run"),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )

    assert f"{len(grid())} cells" in done.stdout
    assert not list(tmp_path.iterdir())
