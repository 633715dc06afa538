# SPDX-License-Identifier: Apache-2.0
"""A mode says what counts against the budget."""

from __future__ import annotations

from typing import Any

import pytest

from tests.request_options.planning import SIZE, row
from vllm_roco.config import blocks_of
from vllm_roco.eviction_schedule import NEVER


def test_both_shares_the_budget() -> None:
    for prompt in (1, 100, 10_000):
        assert row({"mode": "both"}, prompt) == row()


def test_prompt_stops_evicting_where_the_answer_begins() -> None:
    planned = row({"mode": "prompt"}, 1000)
    assert planned == row()._replace(until=1000)
    schedule = planned.schedule(SIZE)
    assert schedule.evicted_blocks(10**6) == schedule.evicted_blocks(1000) > 0


@pytest.mark.parametrize(("prompt", "until"), [(319, 0), (320, 320), (1, 0)])
def test_a_prompt_that_never_evicts_is_not_measured(prompt: int, until: int) -> None:
    """The budget and one stride, 256 and 64 tokens, are full at 320."""
    assert row({"mode": "prompt"}, prompt).until == until


@pytest.mark.parametrize("prompt", [1, 16, 17, 200])
def test_generation_keeps_the_prompt(prompt: int) -> None:
    planned = row({"mode": "generation", "budget": 64}, prompt)
    assert planned.resident_blocks == blocks_of(prompt, SIZE) + 4
    assert planned.sink == max(prompt, 16)
    assert planned.until == NEVER
    # a share of the budget, not of the prompt
    assert planned.shield_blocks == 2
    assert planned.schedule(SIZE).evicted_blocks(prompt) == 0


@pytest.mark.parametrize(("prompt", "sink"), [(8, 16), (128, 128), (129, 16)])
def test_auto_keeps_prompts_of_half_a_budget(prompt: int, sink: int) -> None:
    assert row({"mode": "auto"}, prompt) == row()._replace(sink=sink)


def test_auto_does_not_protect_more_than_there_is() -> None:
    planned = row({"mode": "auto", "budget": 96, "recent": 80}, 32)
    assert planned.sink == 16


@pytest.mark.parametrize("options", [{"mode": "full"}, {"budget": "full"}], ids=repr)
def test_full_never_evicts(options: dict[str, Any]) -> None:
    planned = row(options)
    assert planned == row()._replace(until=0)
    assert planned.schedule(SIZE).evicted_blocks(10**6) == 0


def test_a_budget_where_the_server_keeps_everything_evicts() -> None:
    """It was left unused in silence."""
    assert row(mode="full").until == 0
    assert row({"budget": 128}, mode="full") == row({"budget": 128})
    assert row({"budget": "full"}, mode="full") == row(mode="full")


@pytest.mark.parametrize("mode", ["both", "prompt", "generation", "auto", "full"])
def test_the_servers_mode_is_the_default(mode: str) -> None:
    assert row(mode=mode) == row({"mode": mode})
