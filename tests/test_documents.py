# SPDX-License-Identifier: Apache-2.0
"""Numbers in the documents that follow from the code alone."""

from __future__ import annotations

from pathlib import Path

from vllm_roco.config import RocoConfig
from vllm_roco.eviction_schedule import EvictionSchedule

ROOT = Path(__file__).parents[1]


def test_the_front_page_tells_the_bound_of_the_defaults() -> None:
    config = RocoConfig()
    schedule = EvictionSchedule(16, config.budget, config.stride)
    # asynchronous scheduling has two steps in flight
    held = schedule.max_blocks(2 * config.chunk) * schedule.block_size
    page = " ".join((ROOT / "README.md").read_text().split())
    assert f"budget {config.budget:,}, stride {config.stride}" in page
    assert f"chunk {config.chunk:,}" in page
    assert f"at most {schedule.max_live_tokens():,} tokens after a step" in page
    assert f"holds at most {held:,} tokens" in page
