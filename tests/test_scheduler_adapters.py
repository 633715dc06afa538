# SPDX-License-Identifier: Apache-2.0
"""Adapters in a step are at most as many as vLLM has places for."""

from __future__ import annotations

import pytest
from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest

from tests.scheduler_driver import Driver, Setup

FIRST, SECOND = (LoRARequest(f"adapter {n}", n, f"/nowhere/{n}") for n in (1, 2))


@pytest.mark.parametrize(
    ("asynchronous", "max_steps_in_flight"), [(False, 1), (True, 2)]
)
def test_who_waits_for_its_turn_keeps_the_place_of_its_adapter(
    asynchronous: bool, max_steps_in_flight: int
) -> None:
    """It ran and was not in the step, so another adapter was let in, and vLLM ended the
    engine when both were in one."""
    driver = Driver(
        Setup(
            budget=64,
            max_num_batched_tokens=60,
            prefill_tokens=16,
            caching=True,
            asynchronous=asynchronous,
            max_steps_in_flight=max_steps_in_flight,
        )
    )
    driver.scheduler.lora_config = LoRAConfig(max_loras=1)
    # two prompts have parted behind a chunk, where a third one is cut for a snapshot
    for own in (3, 4):
        driver.add(0, 1, prompt=[2] * 8 + [own] * 142)
        driver.drain(100)
    assert driver.scheduler.reset_prefix_cache()
    reader = driver.add(0, 5, prompt=[2] * 8 + [5] * 142)
    behind = driver.add(0, 5, prompt=[6] * 150, lora_request=FIRST)
    assert driver.step() == {reader: 8, behind: 52}
    other = driver.add(0, 5, prompt=[7] * 4, lora_request=SECOND)
    same = driver.add(0, 1, prompt=[8] * 4, lora_request=FIRST)
    # the reader fills the step, and who is behind waits for its turn
    assert driver.step() == {reader: 56, same: 4}
    while other not in driver.finished:
        scheduled = driver.step()
        assert not {behind, other} <= scheduled.keys()
    driver.drain(50)
    assert len(driver.outputs[other]) == len(driver.outputs[behind]) == 5
