# SPDX-License-Identifier: Apache-2.0
"""The audit sees nothing where nothing is wrong, and every kind of fault put in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.scheduler_driver import Driver, Setup
from tests.soak.audit import Auditor, names_within
from tests.soak.bounds import ServerOptions, bound_of

SETUP = Setup(
    caching=True,
    allow_full=True,
    max_budget=64,
    spare_blocks=20,
    asynchronous=True,
    max_steps_in_flight=2,
)


class Audited(Driver):
    """A driver whose every check is one of the audit, too."""

    def __init__(self, setup: Setup, path: Path) -> None:
        super().__init__(setup)
        config = self.scheduler.vllm_config
        # not of the platform's own choice
        assert config.scheduler_config.async_scheduling == setup.asynchronous
        self.auditor = Auditor(self.scheduler, path)

    def check(self) -> None:
        super().check()
        if hasattr(self, "auditor"):
            self.auditor.look()


@pytest.fixture
def driver(tmp_path: Path) -> Audited:
    return Audited(SETUP, tmp_path / "audit.json")


def serve(driver: Audited, num_steps: int) -> None:
    """Let requests of several kinds in, and run some steps."""
    for options in (None, {"roco_budget": 8}, {"roco_mode": "full"}, None):
        options = options and options | {"roco_sink": 0, "roco_recent": 4}
        if options and "roco_mode" in options:
            options = {"roco_mode": "full"}
        request_id = driver.add(60, 30, extra_args=options)
        driver.auditor.enter(request_id)
    for _ in range(num_steps):
        driver.step()


def test_a_sound_scheduler_has_no_faults(driver: Audited, tmp_path: Path) -> None:
    serve(driver, 30)
    serve(driver, 5)
    driver.drain(1000)
    assert driver.auditor.faults == []
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["requests"] == 0 and report["seen"] == 8
    assert report["counts"]["idle"] >= 1
    assert report["freed blocks"] > 0
    assert report["prefixes"]["published_snapshots"] > 0


def lose_a_block(driver: Audited) -> None:
    pool = driver.scheduler.kv_cache_manager.block_pool
    pool.get_new_blocks(1)


def free_a_held_block(driver: Audited) -> None:
    row = next(iter(driver.manager.req_to_blocks.values()))
    driver.scheduler.kv_cache_manager.block_pool.free_blocks([row[0]])


def hold_more_than_the_bound(driver: Audited) -> None:
    row = driver.manager.req_to_blocks["1"]
    pool = driver.scheduler.kv_cache_manager.block_pool
    row += pool.get_new_blocks(12)


def share_with_one_that_evicts(driver: Audited) -> None:
    first, second, *_ = driver.manager.req_to_blocks.values()
    pool = driver.scheduler.kv_cache_manager.block_pool
    pool.free_blocks([second[0]])
    pool.touch([first[0]])
    second[0] = first[0]


def keep_a_row(driver: Audited) -> None:
    driver.scheduler.requests.pop("0")


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (lose_a_block, "references, not 0"),
        (free_a_held_block, "references, not 1"),
        (hold_more_than_the_bound, "at most"),
        (share_with_one_that_evicts, "and one may evict"),
        (keep_a_row, "is gone and holds"),
    ],
)
def test_a_fault_is_seen(
    plant: Callable[[Audited], Any], says: str, driver: Audited, tmp_path: Path
) -> None:
    serve(driver, 12)
    assert driver.auditor.faults == []
    plant(driver)
    driver.auditor.look()
    faults = json.loads((tmp_path / "audit.json").read_text())["faults"]
    assert any(says in fault for fault in faults), faults


@pytest.fixture
def beside_windows(tmp_path: Path) -> Audited:
    """Three requests with one prefix, the second of which has just begun behind it."""
    setup = replace(SETUP, spare_blocks=60, windows=(30,))
    driver = Audited(setup, tmp_path / "audit.json")
    driver.auditor.enter(driver.add(60, 4))
    driver.drain(1000)
    for _ in range(2):
        driver.auditor.enter(driver.add(60, 30))
        driver.step()
    return driver


def test_who_evicts_shares_what_a_window_reads(beside_windows: Audited) -> None:
    driver = beside_windows
    first, second = driver.windows[0].req_to_blocks.values()
    assert {b.block_id for b in first if not b.is_null} & {b.block_id for b in second}
    assert driver.auditor.faults == []
    driver.drain(1000)
    assert driver.auditor.faults == []


def test_a_shared_block_that_is_written_is_seen(beside_windows: Audited) -> None:
    driver = beside_windows
    first, second = driver.windows[0].req_to_blocks.values()
    pool = driver.scheduler.kv_cache_manager.block_pool
    pool.free_blocks([second[-1]])
    pool.touch([first[-1]])
    second[-1] = first[-1]
    driver.auditor.look()
    assert any("and one may write" in fault for fault in driver.auditor.faults)


def test_a_snapshot_that_shares_a_block_is_seen(driver: Audited) -> None:
    serve(driver, 12)
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    snapshots = cache.store._snapshots
    name, snapshot = next(iter(snapshots.items()))
    snapshots[type(name)(b"another")] = snapshot
    driver.auditor.look()
    assert any("of two snapshots" in fault for fault in driver.auditor.faults)


def test_what_outlives_its_request_is_seen(driver: Audited) -> None:
    serve(driver, 12)
    driver.drain(1000)
    names = {"0", "1", "2", "3"}
    assert len(names_within([driver.manager], names)) <= 1
    driver.manager._next_evictions["2"] = 5
    assert "RocoManager._next_evictions: 2" in names_within([driver.manager], names)


def test_unused_blocks_are_told_once(driver: Audited) -> None:
    before = driver.auditor.unused(())
    assert len(before) == driver.manager.block_pool.num_gpu_blocks - 1
    serve(driver, 12)
    driver.drain(1000)
    again = driver.auditor.unused(before[:1])
    assert again == []
    driver.auditor.look()


SERVER = ServerOptions(*(128, 32, 64, 16, 32), block_size=16, steps_in_flight=1)


@pytest.mark.parametrize(
    ("options", "prompt", "answer", "blocks", "first"),
    [
        # budget, stride, chunk and one more
        (None, 1000, 24, 8 + 2 + 4 + 1, 160),
        # no more than there are tokens
        (None, 30, 10, 3, 160),
        ({"roco_budget": 64}, 1000, 24, 4 + 2 + 4 + 1, 96),
        # stride and chunk are at most the budget that was asked for
        ({"roco": '{"budget": 16, "sink": 0}'}, 1000, 24, 1 + 1 + 1 + 1, 32),
        ({"roco_budget": 0.5}, 500, 24, 16 + 2 + 4 + 1, 288),
        # a block more than is protected
        ({"roco_budget": 0.01}, 500, 24, 4 + 2 + 4 + 1, 96),
        ({"roco_mode": "generation"}, 100, 600, 7 + 8 + 2 + 4 + 1, 272),
        # 63 blocks of a prompt evict 54
        ({"roco_mode": "prompt"}, 1008, 16, 8 + 2 + 4 + 1, 160),
        ({"roco_mode": "prompt"}, 200, 800, 63 - 4, 160),
        ({"roco_mode": "prompt"}, 100, 800, 57, None),
        ({"roco_mode": "full"}, 1000, 24, 64, None),
        ({"roco_budget": "full"}, 1000, 24, 64, None),
    ],
)
def test_bounds_by_hand(
    options: dict[str, Any] | None,
    prompt: int,
    answer: int,
    blocks: int,
    first: int | None,
) -> None:
    bound = bound_of(SERVER, options, prompt, answer)
    assert (bound.blocks, bound.first_eviction) == (blocks, first)
