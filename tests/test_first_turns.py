# SPDX-License-Identifier: Apache-2.0
"""First turns of conversations that are read so that the second begins behind them."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from pytest import MonkeyPatch

from tests import scheduler_driver
from tests.chats import (
    CUE,
    END,
    HEADER,
    MODES,
    QUESTION,
    ask,
    conversation,
    crowd,
    driver_of,
    driver_of_longer,
    most_blocks_held,
    part_behind,
)
from tests.scheduler_driver import BLOCK_SIZE, Driver, Setup
from vllm_roco.kv_cache.first_turns import LEAST_OUTCOMES


def test_a_first_turn_is_read_for_later_ones_behind_a_header_of_others() -> None:
    """That has cost the second one the first's question and answer once more."""
    driver = driver_of_longer()
    part_behind(HEADER, driver)
    # the first one to come leaves a snapshot of the header
    assert [*conversation(driver, HEADER, 4, 8)] == [
        *(len(HEADER) + QUESTION, QUESTION + 2, QUESTION + 2, QUESTION + 2)
    ]
    for _ in range(3):
        assert [*conversation(driver, HEADER, 4, 8)] == [QUESTION, *[QUESTION + 2] * 3]
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    # of the header, and where answers ended
    assert cache.counts().snapshot_hits == 3 + 3 * (1 + 3)


def test_a_first_turn_behind_no_header_is_not_read_for_later_ones() -> None:
    """Most go no further, and what they leave pushes out what others come back to."""
    driver = driver_of_longer(budget=64)
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    for _ in range(3):
        assert [*conversation(driver, [], 1, 8)] == [QUESTION]
    assert not cache.counts().published_snapshots
    # the third turn of one that goes on evicts
    evictions = driver.worker.num_evictions
    turns = conversation(driver, [], 3, 8)
    for _ in range(2):
        next(turns)
        assert driver.worker.num_evictions == evictions
    next(turns)
    assert driver.worker.num_evictions > evictions


def test_who_comes_second_behind_a_header_begins_with_its_blocks() -> None:
    """As in stock vLLM, whatever later turns would be spared."""
    driver = driver_of_longer()
    first, second = (next(conversation(driver, HEADER, 1, 8)) for _ in range(2))
    assert first == len(HEADER) + QUESTION
    assert second == QUESTION


@pytest.mark.parametrize(
    ("more", "question", "expected"),
    [
        pytest.param(0, 5, True, id="none"),
        pytest.param(1, 7, True, id="an eighth of eight"),
        pytest.param(1, 6, False, id="more than that"),
        pytest.param(3, 21, True, id="an eighth of 24"),
        pytest.param(3, 20, False, id="more than an eighth of 23"),
    ],
)
def test_a_first_turn_may_read_a_little_of_its_header_again(
    more: int, question: int, *, expected: bool
) -> None:
    """What stands behind the last whole block of it, where its snapshot is."""
    header = [*HEADER[:-1], *[9] * more, END]
    text = [*header, *[20] * (question - 3), END, *CUE]
    # the least length at which something is evicted is behind the prompt
    evicts = (len(text) // BLOCK_SIZE + 1) * BLOCK_SIZE
    driver = driver_of_longer(budget=evicts - 8)
    part_behind(header, driver)
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    before = cache.counts().published_snapshots
    driver.add(0, 1, prompt=text)
    driver.drain(1000)
    # where the answer ended
    assert cache.counts().published_snapshots == before + expected


@pytest.mark.parametrize(
    ("budget", "answer", "is_kept"),
    [
        pytest.param(256, 8, True, id="the third turn evicts"),
        pytest.param(288, 8, False, id="a later one"),
        pytest.param(288, 22, True, id="answers may be longer"),
        pytest.param(304, 60, False, id="longer than the question"),
    ],
)
def test_a_first_turn_looks_two_turns_ahead(
    budget: int, answer: int, *, is_kept: bool
) -> None:
    driver = driver_of_longer(budget=budget)
    part_behind(HEADER, driver)
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    before = cache.counts().published_snapshots
    (_,) = conversation(driver, HEADER, 1, answer)
    # of the header, and the answer's end
    assert cache.counts().published_snapshots == before + 2 * is_kept


def test_first_turns_with_more_in_common_than_a_header_share_it() -> None:
    """Examples before the question, which stand in no place of a snapshot."""
    driver = driver_of_longer()
    part_behind(HEADER, driver)
    examples = [*HEADER, *[8] * 20]
    for other in range(2):
        driver.add(0, 1, prompt=[*examples, 10 + other])
        driver.drain(1000)
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    saved = cache.counts().saved_tokens
    driver.add(0, 8, prompt=[*examples, *[40] * 3, END, *CUE])
    driver.drain(1000)
    assert cache.counts().saved_tokens == saved + len(examples)


def test_first_turns_that_never_go_on_share_their_header_again() -> None:
    """What they left pushed out what others come back to."""
    driver = driver_of_longer(spare_blocks=200)
    part_behind(HEADER, driver)
    cache = driver.scheduler.prefix_cache
    assert cache is not None

    def num_kept(num_turns: int) -> int:
        before = cache.counts().published_snapshots
        for _ in range(32):
            [*conversation(driver, HEADER, num_turns, 8)]
        return cache.counts().published_snapshots - before

    # of each the end, until so many of those were pushed out that something is known
    assert LEAST_OUTCOMES < num_kept(1) < 2 * LEAST_OUTCOMES
    # one in so many, to see whether that changes
    assert num_kept(1) == 2
    # and it does
    assert num_kept(3) > 2 * 32


def test_samples_of_a_second_turn_show_that_the_first_one_has_gone_on() -> None:
    """They share blocks, behind what it has left."""
    driver = driver_of_longer()
    part_behind(HEADER, driver)
    text = [*HEADER, *[20] * (QUESTION - 3), END, *CUE]
    assert not ask(driver, text, 8)
    text += [*[21] * (QUESTION - 3), END, *CUE]
    for _ in range(2):
        driver.add(0, 8, prompt=text)
    driver.drain(1000)
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    assert cache.counts().snapshot_hits == 1
    assert [*cache._first_turns._outcomes] == [True]


def test_a_reset_cache_does_not_show_that_nobody_goes_on() -> None:
    """As before an update of the weights: what is there goes, pushed out by nobody."""
    driver = driver_of_longer()
    part_behind(HEADER, driver)
    for _ in range(4):
        [*conversation(driver, HEADER, 1, 8)]
    driver.scheduler.reset_prefix_cache()
    part_behind(HEADER, driver)
    first, *others = (next(conversation(driver, HEADER, 1, 8)) for _ in range(2))
    assert first == len(HEADER) + QUESTION
    assert others == [QUESTION]


@pytest.fixture
def driver_of_larger_blocks(monkeypatch: MonkeyPatch) -> Driver:
    """Blocks of 16 tokens."""
    monkeypatch.setattr(scheduler_driver, "BLOCK_SIZE", 16)
    driver = Driver(
        Setup(
            budget=208,
            stride=16,
            chunk=32,
            caching=True,
            hash_size=16,
            turn_end_token_ids=(END,),
            answer_start_token_ids=CUE,
        )
    )
    part_behind(HEADER, driver)
    return driver


def test_short_questions_at_once_are_no_samples_of_one_prompt(
    driver_of_larger_blocks: Driver,
) -> None:
    """They have all their whole blocks in common, those of the header."""
    driver = driver_of_larger_blocks
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    before = cache.counts().published_snapshots
    for number in range(2):
        driver.add(0, 20, prompt=[*HEADER, *[20 + number] * 10, END, *CUE])
    driver.drain(1000)
    # where their answers ended
    assert cache.counts().published_snapshots == before + 2


@pytest.mark.parametrize("question", range(5, 20))
def test_a_first_turn_may_be_less_than_a_block(
    driver_of_larger_blocks: Driver, question: int
) -> None:
    """A look was behind the prompt's last whole block."""
    driver = driver_of_larger_blocks
    driver.add(0, 4, prompt=[*HEADER, *[20] * question, END, *CUE])
    driver.drain(1000)


def num_saved(driver: Driver, text: list[int], answer: int = 8) -> int:
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    saved = cache.counts().saved_tokens
    driver.add(0, answer, prompt=text)
    driver.drain(1000)
    return cache.counts().saved_tokens - saved


def test_questions_about_one_document_behind_a_header_share_it() -> None:
    """Asked one after the other, each by a first turn."""
    driver = driver_of_longer()
    part_behind(HEADER, driver)
    document = [*HEADER, *[8] * 20]
    saved = [
        num_saved(driver, [*document, *[40 + other] * 3, END, *CUE])
        for other in range(8)
    ]
    assert saved[-1] == len(document), saved


def test_samples_of_a_first_turn_share_its_blocks() -> None:
    most_held = []
    for cue in ((), CUE):
        driver = driver_of(answer_start_token_ids=cue, budget=256, stride=8)
        part_behind(HEADER, driver)
        for _ in range(4):
            driver.add(0, 8, prompt=[*HEADER, *[20] * 30, END, *CUE])
        most_held.append(most_blocks_held(driver))
    assert most_held[0] == most_held[1]


def test_a_first_turn_asked_again_is_not_read_again() -> None:
    driver = driver_of_longer()
    part_behind(HEADER, driver)
    text = [*HEADER, *[8] * 30, END, *CUE]
    saved = [num_saved(driver, text) for _ in range(8)]
    assert saved[-1] >= len(text) - 4, saved


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_reset_of_the_cache_says_nothing_of_first_turns(*, is_reset: bool) -> None:
    """Their memory has gone to nobody; all of those before have gone on."""
    driver = driver_of_longer(spare_blocks=20000)
    part_behind(HEADER, driver)
    for _ in range(20):
        [*conversation(driver, HEADER, 3, 8)]
    # whose users are still reading
    for _ in range(64):
        [*conversation(driver, HEADER, 1, 8)]
    if is_reset:
        driver.scheduler.reset_prefix_cache()
    part_behind(HEADER, driver)
    for _ in range(2):
        [*conversation(driver, HEADER, 1, 8)]
    found = [[*conversation(driver, HEADER, 3, 8)] for _ in range(4)]
    assert found[-1] == [QUESTION, QUESTION + 2, QUESTION + 2], found


@pytest.mark.parametrize("cue", [(), CUE])
def test_nothing_is_done_for_turns_that_are_too_long_for_the_model(
    cue: tuple[int, ...],
) -> None:
    """A budget that no sequence reaches changes nothing."""
    driver = driver_of(budget=1024, stride=8, answer_start_token_ids=cue)
    assert driver.scheduler.max_model_len < 1024 + 8
    part_behind(HEADER, driver)
    driver.add(0, 1, prompt=[*HEADER, *[19] * 200, END, *CUE])
    driver.drain(1000)
    for other in range(4):
        driver.add(0, 208, prompt=[*HEADER, *[20 + other] * 200, END, *CUE])
    # the header once
    assert most_blocks_held(driver) <= (len(HEADER) + 4 * 412) // BLOCK_SIZE


def test_a_batch_behind_a_header_takes_no_longer_for_turns_that_never_come() -> None:
    """All hold the header alone before it is known whether the first goes on."""
    num_steps = []
    for cue in ((), CUE):
        driver = driver_of(
            budget=256, stride=8, answer_start_token_ids=cue, spare_blocks=0
        )
        part_behind(HEADER, driver)
        # each way has read the header once
        driver.add(0, 1, prompt=[*HEADER, *[19] * 20, END, *CUE])
        driver.drain(1000)
        begun = driver.num_steps
        for other in range(16):
            driver.add(0, 16, prompt=[*HEADER, *[20 + other] * 20, END, *CUE])
        driver.drain(4000)
        num_steps.append(driver.num_steps - begun)
    assert num_steps[1] <= 1.5 * num_steps[0], num_steps


@pytest.mark.parametrize("mode", MODES[:-1])
def test_first_turns_in_a_crowd_leave_what_each_would_alone(
    mode: dict[str, Any],
) -> None:
    """Behind one header, which some of them share while others copy it."""
    outcomes: list[bool] = []
    num_shared = 0
    for seed in range(16):
        random = Random(seed)
        driver = Driver(
            Setup(
                budget=128,
                stride=8,
                chunk=16,
                spare_blocks=random.choice([60, 300]),
                caching=True,
                turn_end_token_ids=(END,),
                answer_start_token_ids=CUE,
                allow_full=True,
                **mode,
            )
        )
        header = [2] * (BLOCK_SIZE * random.randrange(8, 16) - 1) + [END]
        texts = {number: [*header] for number in range(6)}
        crowd(driver, random, texts, range(10, 24), share_that_ends=0.4)
        cache = driver.scheduler.prefix_cache
        assert cache is not None
        outcomes += cache._first_turns._outcomes
        num_shared += driver.worker.num_shared
    assert outcomes.count(True) > 8
    assert outcomes.count(False) > 8
    assert num_shared > 100
