# SPDX-License-Identifier: Apache-2.0
"""Conversations with a driven scheduler, whose turns a client asks one by one."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from tests.scheduler_driver import BLOCK_SIZE, Driver, Setup

END = 97
"""None of the tokens that `PagedWorker` writes, nor is the cue."""
QUESTION, ANSWER = 22, 6
MODES = [
    pytest.param({}, id="synchronous"),
    pytest.param({"asynchronous": True, "max_steps_in_flight": 2}, id="asynchronous"),
    pytest.param({"asynchronous": True, "max_steps_in_flight": 3}, id="two-stages"),
    pytest.param({"windows": (6, 30)}, id="windows"),
]


CUE = (95, 96)
"""What a template puts before an answer."""


def driver_of(**changes: Any) -> Driver:
    """Return a driver with chunks of 32 tokens, where the first eviction is at 24."""
    return Driver(Setup(chunk=32, caching=True, turn_end_token_ids=(END,), **changes))


def conversation(
    driver: Driver,
    header: list[int],
    num_turns: int,
    answer: int = ANSWER,
    extra_args: dict[str, Any] | None = None,
) -> Iterator[int]:
    """Let a client ask, and yield how many tokens each prompt has to read.

    Args:
        driver: Of the scheduler.
        header: What the conversation begins with.
        num_turns: Questions.
        answer: Tokens that are written.
        extra_args: Options of its requests.
    """
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    text = header
    for _ in range(num_turns):
        number = len(driver.outputs)
        # as a template has it: the question's end, and what an answer begins with
        text = [*text, *[20 + number] * (QUESTION - 3), END, *CUE]
        saved = cache.counts().saved_tokens
        name = driver.add(0, answer, prompt=text, extra_args=extra_args)
        driver.drain(1000)
        yield len(text) - (cache.counts().saved_tokens - saved)
        text = [*text, *driver.outputs[name], END]


def ask(driver: Driver, text: list[int], answer: int) -> int:
    """Ask, take the answer into the text; return with how many answers it began."""
    hits = driver.worker.num_answers_hit
    name = driver.add(0, answer, prompt=text)
    driver.drain(1000)
    text += [*driver.outputs[name], END]
    return driver.worker.num_answers_hit - hits


def crowd(
    driver: Driver,
    random: Random,
    texts: dict[int, list[int]],
    questions: range,
    share_that_ends: float = 0,
) -> int:
    """Let conversations go on by chance; return how often all were preempted.

    Args:
        driver: Of the scheduler.
        random: Decides who asks when, and what for.
        texts: What each has said so far.
        questions: How long they may be.
        share_that_ends: Share of turns behind which another conversation begins.
    """
    options = [
        *[None] * 12,
        *({"roco_mode": name} for name in ("full", "prompt", "auto")),
        {"roco_chunk": BLOCK_SIZE},
    ]
    begun = {number: [*text] for number, text in texts.items()}
    running: dict[int, str] = {}
    num_preemptions = 0
    for _ in range(60):
        for number, text in texts.items():
            name = running.get(number)
            if name in driver.scheduler.requests or random.random() < 0.5:
                continue
            if name is not None:
                text += [*driver.outputs[name], END]
                if share_that_ends and random.random() < share_that_ends:
                    text[:] = begun[number]
            question = random.choice(questions)
            text += [*[20 + number + len(driver.outputs)] * question, END, *CUE]
            running[number] = driver.add(
                0,
                random.randrange(1, 24),
                prompt=text,
                ignore_stop=random.random() < 0.5,
                extra_args=random.choice(options),
            )
        for _ in range(random.randrange(12)):
            driver.step()
        if random.random() < 0.05:
            driver.preempt_all()
            num_preemptions += 1
    driver.drain(4000)
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    assert not cache.blocks._for_next_turn
    assert not cache.blocks._first_to_ask
    return num_preemptions


HEADER = [9] * 191 + [END]


def driver_of_longer(**changes: Any) -> Driver:
    """Return a driver of conversations behind `HEADER` whose third turns evict."""
    longer = {"budget": 256, "stride": 8, **changes}
    return driver_of(answer_start_token_ids=CUE, **longer)


def most_blocks_held(driver: Driver) -> int:
    """Serve all that is asked, and return the most blocks in use behind a step."""
    pool = driver.scheduler.kv_cache_manager.block_pool
    held = []
    while driver.scheduler.has_requests():
        driver.step()
        held.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
    return max(held)


def part_behind(header: list[int], driver: Driver) -> None:
    """Let two prompts show where they part."""
    for other in range(2):
        driver.add(0, 1, prompt=[*header, *[10 + other] * 40])
        driver.drain(1000)
