# SPDX-License-Identifier: Apache-2.0
"""`prefix_hits: longest`: next turns begin behind the answers of earlier ones.

What they keep is not what reading their prompts would keep, so `PagedWorker` holds
these hits to the prefix alone; everything else is as in `test_prefix_scheduler`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.scheduler_driver import Driver, Setup
from vllm_roco.kv_cache.prefix_cache import PrefixCache
from vllm_roco.start_up_line import describe

PROMPT = list(range(2, 80))
"""78 tokens; the first eviction is at 24, chunks are of 8, blocks of 4."""
SHORT = PROMPT[:14]

modes = pytest.mark.parametrize(
    ("asynchronous", "max_steps_in_flight"),
    [
        pytest.param(False, 1, id="synchronous"),
        pytest.param(True, 2, id="asynchronous"),
        pytest.param(True, 3, id="two-stages"),
    ],
)


def driver_of(**changes: Any) -> Driver:
    return Driver(Setup(**{"caching": True, "prefix_hits": "longest", **changes}))


def cache_of(driver: Driver) -> PrefixCache:
    assert driver.scheduler.prefix_cache is not None
    return driver.scheduler.prefix_cache


def answered(
    driver: Driver, prompt: list[int], max_tokens: int, **more: Any
) -> tuple[int, list[int]]:
    """Run a request alone; return with how many tokens it began, and all its text."""
    saved = cache_of(driver).counts().saved_tokens
    name = driver.add(0, max_tokens, prompt=prompt, **more)
    driver.drain(1000)
    text = [*prompt, *driver.outputs[name]]
    return cache_of(driver).counts().saved_tokens - saved, text


@modes
@pytest.mark.parametrize("num_outputs", range(20, 29))
def test_a_next_turn_begins_where_the_last_one_ended(
    asynchronous: bool, max_steps_in_flight: int, num_outputs: int
) -> None:
    """Each read the last answer, and up to a chunk of what was before it, again."""
    driver = driver_of(
        asynchronous=asynchronous, max_steps_in_flight=max_steps_in_flight
    )
    text = PROMPT
    for turn in range(4):
        hit, text = answered(driver, text, num_outputs)
        if turn:
            # blocks are hit whole, and the last token was read by steps in flight alone
            ended = len(text) - num_outputs - 5
            most = ended if max_steps_in_flight > 2 else ended - 1
            assert (ended - 1) // 4 * 4 <= hit <= most
        text += [90 + turn] * 5
    assert driver.worker.num_evictions


@modes
def test_an_answer_that_stops_in_flight(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """Steps behind the stop token may evict, and write into what is kept."""
    driver = driver_of(
        asynchronous=asynchronous, max_steps_in_flight=max_steps_in_flight
    )
    hits = 0
    for first in range(2, 60):
        prompt = [first, *PROMPT[1:31]]
        _, text = answered(driver, prompt, 40, ignore_stop=False)
        hits += answered(driver, [*text, 90], 1)[0] > len(prompt)
    assert hits > 20


def test_a_prompt_that_evicts_begins_with_blocks() -> None:
    driver = driver_of()
    _, text = answered(driver, SHORT, 6)
    hit, _ = answered(driver, [*text, *PROMPT], 1)
    assert hit == 16
    # as far as nothing would have been evicted
    _, text = answered(driver, [9, *SHORT], 1, extra_args=None)
    assert answered(driver_of(prefix_hits="exact"), [*text, *PROMPT], 1)[0] == 0


def test_of_an_answer_and_a_snapshot_the_longer_one_is_hit() -> None:
    driver = driver_of()
    _, text = answered(driver, PROMPT[:30], 8)
    assert answered(driver, [*text, *PROMPT], 1)[0] == 36
    # and what that one has left at its last chunk's end
    assert answered(driver, [*text, *PROMPT], 1)[0] == 112


def test_who_shares_an_answer_in_part_begins_before_it() -> None:
    driver = driver_of()
    _, text = answered(driver, PROMPT[:30], 8)
    assert answered(driver, [*text[:-3], *PROMPT], 1)[0] == 24


def test_an_answer_that_lost_a_block_is_not_hit() -> None:
    for place in (0, 2, -1):
        driver = driver_of()
        _, text = answered(driver, PROMPT[:30], 8)
        (*_, last) = cache_of(driver).store._snapshots.values()
        last.blocks[place].reset_hash()
        assert answered(driver, [*text, *PROMPT], 1)[0] == 24
        driver.check()


def test_behind_a_lost_answer_the_one_before_it_is_hit() -> None:
    """The last end alone had been tried, and its loss sent a turn back to a chunk."""
    driver = driver_of()
    _, text = answered(driver, PROMPT[:30], 8)
    hit, text = answered(driver, [*text, 90], 8)
    assert hit == 36
    (*_, last) = cache_of(driver).store._snapshots.values()
    last.blocks[0].reset_hash()
    assert answered(driver, [*text, 91], 1)[0] == 36
    driver.check()


def test_what_others_may_not_have_stays_apart() -> None:
    driver = driver_of(max_budget=24)
    _, text = answered(driver, PROMPT[:30], 8)
    other = {"extra_args": {"roco_budget": 24}}
    assert answered(driver, [*text, 1], 1, **other)[0] == 0
    assert answered(driver, [*text, 2], 1, cache_salt="salt")[0] == 0
    assert answered(driver, [*text, 3], 1, skip_reading_prefix_cache=True)[0] == 0
    assert answered(driver, [*text, 4], 1)[0] == 36
    assert driver.scheduler.reset_prefix_cache()
    assert answered(driver, [*text, 5], 1)[0] == 0


def test_what_is_kept_of_an_answer_for_good_is_none_of_a_prompt() -> None:
    """In mode `prompt` an answer is kept whole, which no prompt would be."""
    driver = driver_of(mode="prompt", allow_full=True)
    _, text = answered(driver, PROMPT[:30], 20)
    assert answered(driver, [*text, 1], 1)[0] == 24


def test_a_prompt_that_was_not_read_leaves_no_end() -> None:
    driver = driver_of()
    name = driver.add(0, 1, prompt=PROMPT)
    for _ in range(4):
        driver.step()
    driver.abort(name)
    assert cache_of(driver).counts().published_snapshots == 0


def test_who_waits_for_none_is_forgotten() -> None:
    driver = driver_of()
    _, text = answered(driver, PROMPT[:30], 8)
    name = driver.add(0, 1, prompt=[*text, 1])
    earlier = cache_of(driver)._earlier
    assert earlier is not None
    assert earlier._turns
    driver.abort(name)
    assert not earlier._turns


def test_the_rest_behind_an_answer_joins_any_step() -> None:
    """A turn's few own tokens had waited for all prompts that are read in chunks."""
    driver = driver_of(prefill_tokens=1, max_num_batched_tokens=64)
    _, text = answered(driver, PROMPT[:30], 7)
    for token in (60, 61):
        driver.add(0, 1, prompt=[token] * 60)
    again = driver.add(0, 1, prompt=[*text, 1, 1, 1])
    step = driver.step()
    assert step["1"] == 16
    assert "2" not in step
    assert step[again] == 4
    driver.drain(100)


def test_the_rest_behind_blocks_joins_any_step() -> None:
    driver = driver_of(prefill_tokens=1, max_num_batched_tokens=64)
    _, text = answered(driver, PROMPT[:19], 3)
    for token in (60, 61):
        driver.add(0, 1, prompt=[token] * 60)
    again = driver.add(0, 1, prompt=[*text[:17], 1, 1, 1, 1, 1, 1, 1])
    step = driver.step()
    assert step[again] == 8
    driver.drain(100)


@pytest.mark.parametrize("spare_blocks", [0, 1, 5, 8, 14])
def test_a_pool_with_little_room_serves_all(spare_blocks: int) -> None:
    driver = driver_of(spare_blocks=spare_blocks)
    texts = [[first, *PROMPT[:25]] for first in (81, 82, 83)]
    for _ in range(4):
        names = [driver.add(0, 9, prompt=text) for text in texts]
        driver.drain(2000)
        texts = [
            [*text, *driver.outputs[name], 1, 2, 3]
            for text, name in zip(texts, names, strict=True)
        ]


def test_the_start_up_line_tells_of_them() -> None:
    assert "Prefix caching: on, longest hits." in describe(driver_of().scheduler)


def test_the_start_up_line_tells_when_they_do_nothing() -> None:
    """It said that caching is off, and nothing of the option."""
    line = describe(driver_of(caching=False).scheduler)
    assert (
        "Prefix caching: off (enable_prefix_caching = False); prefix_hits = 'longest' "
        "does nothing." in line
    )


def test_windows_refuse_them() -> None:
    setup = Setup(caching=True, prefix_hits="longest", windows=(8,))
    with pytest.raises(NotImplementedError, match="prefix_hits = 'longest' is not"):
        setup.scheduler()
    replace(setup, caching=False).scheduler().shutdown()
