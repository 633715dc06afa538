# SPDX-License-Identifier: Apache-2.0
"""A device's counter of moved blocks, shown without waiting for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vllm.config import ParallelConfig, VllmConfig

from vllm_roco.attention.moved_blocks import (
    INTERVAL_SECONDS,
    DeviceMovedBlocks,
    moved_blocks_of,
)
from vllm_roco.observability.metrics import read_engines
from vllm_roco.observability.publisher import MetricsPublisher, MovedBlocks


class Device:
    """A clock and a stream that move only when told to.

    A CPU copies at once; what a GPU adds is that the copy's event comes later.
    """

    def __init__(self) -> None:
        self.seconds = 100.0
        self.num_copies = 0
        self._num_done = 0

    def clock(self) -> float:
        return self.seconds

    def record(self) -> None:
        self.num_copies += 1

    def query(self) -> bool:
        return self._num_done == self.num_copies

    def catch_up(self) -> None:
        self._num_done = self.num_copies


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def counter() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64)


@pytest.fixture
def shown(device: Device, counter: torch.Tensor) -> DeviceMovedBlocks:
    return DeviceMovedBlocks(counter, MovedBlocks("1", 0), device, device.clock)


@pytest.fixture
def engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MetricsPublisher]:
    """An engine core's publisher, which a test may also ask for later."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with contextlib.closing(
        MetricsPublisher(instance_id="1", engine=0, model_name="m", budget_tokens=64)
    ) as publisher:
        yield publisher


def moved_blocks() -> int:
    """What the front end, here this process, reads of the only engine."""
    (metrics,) = read_engines()
    return metrics.moved_blocks


def test_a_copy_is_shown_once_it_has_arrived(
    device: Device,
    counter: torch.Tensor,
    shown: DeviceMovedBlocks,
    engine: MetricsPublisher,
) -> None:
    shown.poll()
    assert device.num_copies == 1
    device.catch_up()
    for expected in (5, 12):
        counter.fill_(expected)
        device.seconds += INTERVAL_SECONDS
        before = moved_blocks()
        shown.poll()
        # under way, and not waited for
        for _ in range(3):
            device.seconds += INTERVAL_SECONDS
            shown.poll()
        assert moved_blocks() == before
        device.catch_up()
        shown.poll()
        assert moved_blocks() == expected
        device.catch_up()


def test_copies_are_rare(
    device: Device,
    counter: torch.Tensor,
    shown: DeviceMovedBlocks,
    engine: MetricsPublisher,
) -> None:
    steps = 500
    for _ in range(steps):
        counter.add_(1)
        shown.poll()
        device.catch_up()
        device.seconds += INTERVAL_SECONDS / 50
    assert device.num_copies == pytest.approx(steps / 50, abs=1)
    assert steps - 2 * 50 < moved_blocks() < steps


def test_what_warm_up_runs_moved_does_not_count(
    device: Device,
    counter: torch.Tensor,
    shown: DeviceMovedBlocks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for _ in range(3):
        shown.poll()
        counter.add_(7)
        device.seconds += INTERVAL_SECONDS
    assert device.num_copies == 0
    request.getfixturevalue("engine")
    # the first step that serves, and what it moves
    shown.poll()
    counter.add_(2)
    device.catch_up()
    device.seconds += INTERVAL_SECONDS
    shown.poll()
    device.catch_up()
    shown.poll()
    assert moved_blocks() == 2


def test_groups_of_layers_are_summed(engine: MetricsPublisher) -> None:
    counters = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    devices = [Device() for _ in counters]
    groups = [
        DeviceMovedBlocks(counter, MovedBlocks("1", 0), device, device.clock)
        for counter, device in zip(counters, devices, strict=True)
    ]
    for step in range(4):
        for group, counter, device in zip(groups, counters, devices, strict=True):
            group.poll()
            counter.add_(1 + step)
            device.catch_up()
            device.seconds += INTERVAL_SECONDS
    # the first copy was the start, the last one is not shown yet
    assert moved_blocks() == 2 * (1 + 2)


def test_one_worker_of_an_engine_counts() -> None:
    config = VllmConfig()
    config.parallel_config = replace(ParallelConfig(), rank=1)
    assert moved_blocks_of(config) is None
    config.parallel_config = replace(ParallelConfig(), rank=0)
    assert moved_blocks_of(config) is not None
