# SPDX-License-Identifier: Apache-2.0
"""Requests that evict as they ask for, over vLLM's real scheduler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.engine import FinishReason

from tests.scheduler_driver import Driver, Setup
from tests.test_prefix_scheduler import PROMPT, cache_of, driver_of, hit_of
from vllm_roco.answers import Answers
from vllm_roco.chunking import ChunkEnds
from vllm_roco.config import MODES
from vllm_roco.eviction_row import NUM_ROW_FIELDS, ROW_KEY, EvictionRow
from vllm_roco.eviction_schedule import NEVER
from vllm_roco.observability.metrics import read_engines
from vllm_roco.request_options.error import RequestOptionError
from vllm_roco.request_options.planner import RequestPlan, RequestPlanner
from vllm_roco.request_plans import LaterTurn, ResolvedPlan, most_blocks_by_default
from vllm_roco.start_up_line import describe

OPEN: dict[str, Any] = {"max_budget": 200, "allow_full": True}


def held_at_most(driver: Driver, request_id: str) -> int:
    """Run until nothing is left, and return the most blocks that a request held."""
    most = 0
    while driver.scheduler.has_requests() or driver.num_in_flight:
        driver.step()
        most = max(most, driver.manager.held_blocks(request_id))
    return most


@pytest.mark.parametrize(
    ("options", "most"),
    [
        pytest.param(None, 8, id="default"),
        pytest.param({"roco_budget": 32}, 12, id="budget"),
        pytest.param({"roco_mode": "generation"}, 22, id="generation"),
        pytest.param({"roco_mode": "prompt"}, 25, id="prompt"),
        pytest.param({"roco_mode": "full"}, 35, id="full"),
    ],
)
def test_each_request_is_held_to_its_own_bound(
    options: dict[str, Any] | None, most: int
) -> None:
    driver = Driver(Setup(**OPEN))
    driver.add(60, 80)
    request_id = driver.add(60, 80, extra_args=options)
    held = held_at_most(driver, request_id)
    assert most - 2 <= held <= most
    assert len(driver.outputs[request_id]) == 80
    assert not len(driver.scheduler.request_plans)


def test_a_snapshot_is_of_all_that_decides_what_is_kept() -> None:
    """All but where evictions end, which for a place in the prompt is behind it."""
    row = EvictionRow(*range(1, 1 + NUM_ROW_FIELDS))
    plan = RequestPlan(row, chunk=4)

    def key_of(plan: RequestPlan) -> bytes:
        return ResolvedPlan.of(plan, 4, 1, 1024).snapshot_key

    keys = {key_of(plan), key_of(plan._replace(chunk=8))}
    for name in row._fields:
        other = key_of(plan._replace(row=row._replace(**{name: 99})))
        assert (other in keys) == (name == "until")
        keys.add(other)
    assert len(keys) == 1 + NUM_ROW_FIELDS


@pytest.mark.parametrize(
    ("answers", "length", "expected"),
    [
        # 40 tokens since the turn before; the first eviction is at 96
        pytest.param(((16, 56), (20, NEVER)), 56, True, id="just long enough"),
        pytest.param(((17, 56), (20, NEVER)), 56, False, id="a token too short"),
        pytest.param(((10, 95), (20, NEVER)), 95, True, id="the last before it"),
        pytest.param(((10, 96), (20, NEVER)), 96, False, id="evicts in this turn"),
        pytest.param(((4, 10, 56), (8, 20, NEVER)), 56, True, id="the last turn's"),
        pytest.param(((4, 30, 56), (8, 40, NEVER)), 56, False, id="not both turns'"),
        pytest.param(((10, 40), (20, NEVER)), 56, True, id="from answer to prompt"),
        pytest.param(((56,), (NEVER,), 40), 56, True, id="the turn's after the next"),
        pytest.param(((56,), (NEVER,), 43), 56, False, id="a later one's"),
        pytest.param(((10, 20), (20, 30)), 56, False, id="nothing is to be answered"),
        pytest.param(((), ()), 56, False, id="no answers"),
    ],
)
def test_a_conversation_may_evict_in_its_next_turn(
    answers: tuple[Any, ...], length: int, *, expected: bool
) -> None:
    """If it gets as long again as the last turn made it, answer and question."""
    scheduler = Driver(Setup(budget=64, stride=32)).scheduler
    default, default_plan = scheduler.request_plans.default, scheduler._default_plan
    assert default.first_eviction == 96
    assert not default.evicts_in_later_turn
    found = Answers(*answers)
    ends = ChunkEnds(default.chunk, (32,), found)
    longer = found.later_prompt(length, max_tokens=6)
    later_turn = None if longer is None else LaterTurn(longer, default_plan)
    plan = default.read_in(ends, length, later_turn)
    assert plan.evicts_in_later_turn == expected
    goes_on = found.is_open and not found.is_first_turn
    assert plan.keeps_for_next_turn == (goes_on or expected)
    likely = {"keeps_for_next_turn": False, "evicts_in_later_turn": False}
    assert replace(plan, ends=default.ends, **likely) == default
    assert plan.ends == ends
    if later_turn is not None:
        # of which other blocks are kept
        other = later_turn._replace(plan=default_plan._replace(chunk=4))
        assert default.read_in(ends, length, other) == replace(default, ends=ends)


def test_workers_are_told_what_differs_alone() -> None:
    """Parameters are shared between requests, and with whoever asked."""
    driver = Driver(Setup(**OPEN))
    extra_args = {"roco_budget": 32, "another": 1}
    mine = driver.add(60, 5, extra_args=extra_args)
    same = driver.add(60, 5, extra_args={"roco_budget": 16})
    assert extra_args == {"roco_budget": 32, "another": 1}
    params = driver.scheduler.requests[mine].sampling_params
    assert params is not None and params.extra_args is not None
    assert params.extra_args.pop(ROW_KEY)[:3] == [8, 2, 2**31 - 1]
    assert params.extra_args == extra_args
    params = driver.scheduler.requests[same].sampling_params
    assert params is not None
    assert params.extra_args == {"roco_budget": 16}


def test_a_plan_survives_preemption() -> None:
    driver = Driver(Setup(**OPEN))
    request_id = driver.add(60, 30, extra_args={"roco_budget": 32})
    for _ in range(15):
        driver.step()
    driver.preempt_all()
    assert driver.scheduler.request_plans.of(request_id).schedule.budget == 32
    driver.drain(200)
    assert len(driver.outputs[request_id]) == 30


@pytest.mark.parametrize(
    "options",
    [{"roco_budget": 5000}, {"roco_mode": "full"}, {"roco_row": [1] * 8}],
    ids=str,
)
def test_what_cannot_be_had_is_refused_alone(options: dict[str, Any]) -> None:
    driver = Driver(Setup())
    other = driver.add(60, 5)
    refused = driver.add(60, 5, extra_args=options)
    driver.drain(50)
    assert driver.finished[refused].finish_reason is FinishReason.ERROR
    assert len(driver.outputs[other]) == 5


def test_a_request_larger_than_the_cache_is_refused_alone() -> None:
    """It would have waited for ever."""
    driver = Driver(Setup(spare_blocks=0, **OPEN))
    pool = driver.manager.block_pool.num_gpu_blocks - 1
    tokens = pool * 4
    fits = driver.add(tokens - 50, 50, extra_args={"roco_mode": "full"})
    refused = driver.add(tokens - 50, 51, extra_args={"roco_mode": "full"})
    driver.drain(500)
    assert driver.finished[refused].finish_reason is FinishReason.ERROR
    assert len(driver.outputs[fits]) == 50


def test_bounds_are_counted_as_requests_are_taken() -> None:
    """Each once, and none of a request that is refused."""
    driver = Driver(Setup(spare_blocks=0, **OPEN))
    config = driver.scheduler.vllm_config
    for options, tokens in [
        (None, 36),
        ({"roco_budget": 32}, 52),
        ({"roco_mode": "generation"}, 96),
        ({"roco_mode": "prompt"}, 100),
        ({"roco_mode": "full"}, 140),
        ({"roco_budget": 5000}, 0),
        ({"roco_mode": "full", "roco_sink": -1}, 0),
    ]:
        before = read_engines(config.instance_id)[0].request_bounds
        driver.add(60, 80, extra_args=options)
        after = read_engines(config.instance_id)[0].request_bounds
        assert after.total - before.total == tokens
        assert sum(after.counts) - sum(before.counts) == bool(tokens)
    for _ in range(10):
        driver.step()
    driver.preempt_all()
    driver.drain(2000)
    assert read_engines(config.instance_id)[0].request_bounds == after


def test_a_budget_larger_than_the_cache_is_refused_at_the_start() -> None:
    setup = Setup(max_budget=400, spare_blocks=-1)
    with pytest.raises(ValueError, match="max_budget = 400 lets a request hold 105"):
        setup.scheduler()


def test_the_start_up_line_names_limits() -> None:
    line = describe(Setup(**OPEN).scheduler())
    assert "block size 4, max_budget 200, allow_full. A sequence attends" in line


@pytest.mark.parametrize(
    ("ranks", "agree", "says"),
    [
        (1, True, ". Prefix caching: "),
        (2, False, ". Each of 2 tensor-parallel ranks chooses by its own heads."),
        (2, True, ". Each of 2 tensor-parallel ranks chooses what one GPU would."),
        (16, True, ". Each of 16 tensor-parallel ranks chooses what the others do, "),
    ],
)
def test_the_start_up_line_tells_who_chooses(
    ranks: int, agree: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Setup().scheduler()
    scheduler.roco_config = replace(scheduler.roco_config, agree=agree)
    monkeypatch.setattr(
        scheduler.vllm_config.parallel_config, "tensor_parallel_size", ranks
    )
    assert f" tokens of KV cache{says}" in describe(scheduler)


KEEPS = "A sequence keeps what it generates, and holds at most 1024 tokens of KV cache."


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        # a stride, a chunk and a block above the budget of 16 tokens, or of 200
        (
            "both",
            "A sequence attends over at most 23 tokens after a step and holds at ",
        ),
        ("both", "holds at most 36 tokens of KV cache."),
        ("auto", "block size 4, mode auto, max_budget 200, allow_full. A sequence att"),
        (
            "auto",
            "attends over at most 23 tokens after a step and holds at most 36 tok",
        ),
        (
            "generation",
            "attends over at most 207 tokens after a step and holds at most",
        ),
        ("generation", "holds at most 220 tokens of KV cache."),
        ("prompt", f"block size 4, mode prompt, max_budget 200, allow_full. {KEEPS}"),
        ("full", f"block size 4, mode full, max_budget 200, allow_full. {KEEPS}"),
    ],
)
def test_the_start_up_line_tells_what_a_mode_keeps(mode: str, says: str) -> None:
    assert says in describe(Setup(mode=mode, **OPEN).scheduler())


@pytest.mark.parametrize("mode", MODES)
def test_the_start_up_line_tells_what_is_held(mode: str) -> None:
    """Not more, and of a long sequence nearly that much.

    A chunk of it is there for prompts that evict while they are read.
    """
    driver = Driver(Setup(mode=mode, **OPEN))
    line = describe(driver.scheduler)
    told = int(line.partition("holds at most ")[2].split()[0])
    prompt, answer = {"prompt": (20, 1000), "generation": (180, 200)}.get(
        mode, (900, 120)
    )
    held = 4 * held_at_most(driver, driver.add(prompt, answer))
    assert told - 16 <= held <= told


def test_the_start_up_line_does_not_tell_more_than_a_sequence_has() -> None:
    """In mode `generation` it told what `max_budget` lets a longer one hold."""
    setup = Setup(mode="generation", max_budget=2000)
    assert "holds at most 1024 tokens of KV cache" in describe(setup.scheduler())


@given(
    st.sampled_from(MODES), st.integers(1, 400), st.integers(1, 400), st.integers(1, 3)
)
def test_no_request_holds_more_than_the_default_of_a_mode(
    mode: str, prompt: int, answer: int, steps: int
) -> None:
    config = Setup(mode=mode, **OPEN).roco_config()
    try:
        plan = RequestPlanner(config, 4).plan(None, prompt)
    except RequestOptionError:
        # the prompt is too long for its mode
        assert (mode, prompt > 180) == ("generation", True)
        return
    most = most_blocks_by_default(config, 4, steps, 800)
    assert ResolvedPlan.of(plan, 4, steps, prompt + answer).max_blocks <= most


def test_a_running_large_chunk_is_not_overtaken_for_ever() -> None:
    """Prompts of small chunks come without end beside one of a large chunk."""
    driver = Driver(Setup(max_num_batched_tokens=4 + 24, **OPEN))
    small = {"roco_chunk": 8}
    driver.add(200, 1, extra_args=small)
    large = driver.add(200, 1, extra_args={"roco_chunk": 24})
    while large not in driver.finished:
        driver.add(12, 1, extra_args=small)
        driver.step()
        assert driver.num_steps < 100, "the large chunk starves"
    driver.drain(500)


def test_who_waits_with_a_large_chunk_is_not_overtaken() -> None:
    driver = Driver(Setup(max_num_batched_tokens=4 + 24, **OPEN))
    small = {"roco_chunk": 8}
    driver.add(200, 1, extra_args=small)
    for _ in range(2):
        driver.step()
    waiting = driver.add(200, 1, extra_args={"roco_chunk": 24})
    behind = []
    while not driver.scheduler.requests[waiting].num_computed_tokens:
        behind.append(driver.add(12, 1, extra_args=small))
        taken = driver.step()
        assert taken.get(waiting) or not any(name in taken for name in behind)
        assert driver.num_steps < 100, "the large chunk starves"
    driver.drain(500)


def test_rows_that_keep_other_blocks_share_no_snapshots() -> None:
    driver = driver_of(**OPEN)
    budget = {"extra_args": {"roco_budget": 32, "roco_chunk": 8}}
    assert hit_of(driver, PROMPT, 1) == 0
    assert hit_of(driver, PROMPT, 1, **budget) == 0
    assert hit_of(driver, PROMPT, 1, **budget) == 72
    assert hit_of(driver, PROMPT, 1) == 72
    # the same row up to the end of the prompt
    assert hit_of(driver, PROMPT, 9, extra_args={"roco_mode": "prompt"}) == 72


def test_blocks_without_statistics_serve_their_like_alone() -> None:
    driver = driver_of(**OPEN)
    full = {"extra_args": {"roco_mode": "full"}}
    blocks = cache_of(driver).blocks

    def saved(prompt: list[int], max_tokens: int, **more: Any) -> int:
        before = blocks.num_saved_tokens
        driver.add(len(prompt), max_tokens, prompt=prompt, **more)
        driver.drain(500)
        return blocks.num_saved_tokens - before

    prompt = PROMPT[:20]
    assert saved(prompt, 1, **full) == 0
    assert saved(prompt, 30) == 0
    assert saved(prompt, 1, **full) == 16
    assert saved(prompt, 30) == 16
    other = PROMPT[30:50]
    assert saved(other, 30) == 0
    # what is measured serves all
    assert saved(other, 1, **full) == 16
