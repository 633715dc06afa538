# SPDX-License-Identifier: Apache-2.0
"""Memory and file descriptors of an engine's processes, as Linux counts them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

GROWTH = 0.05
"""By how much memory may grow after the first tenth; allocators keep some."""
SLACK_MIB = 48
WARM = 1000
"""Requests until all buffers of an engine have seen their largest batches."""
MORE_FILES = 8
"""Descriptors that may be open more: connections which are about to be closed."""


@dataclass(frozen=True)
class OneProcess:
    """One of them.

    Attributes:
        pid: Its process id.
        name: What it calls itself, such as `VLLM::Worker_TP1`.
        mib: Resident memory that is its alone, in MiB.
        files: Open file descriptors.
    """

    pid: int
    name: str
    mib: float
    files: int

    def __str__(self) -> str:
        return f"{self.name} {self.mib:.0f} MiB {self.files} files"


@dataclass(frozen=True)
class Sample:
    """All processes together, at rest.

    Attributes:
        mib: Resident memory that is theirs alone, in MiB.
        files: Open file descriptors.
        processes: How many there are.
        sent: Requests until then.
        each: Every one of them, in the order in which they were started.
    """

    mib: float
    files: int
    processes: int
    sent: int
    each: tuple[OneProcess, ...] = ()

    def __str__(self) -> str:
        of_each = "; ".join(map(str, self.each))
        return f"{self.mib:.0f} MiB, {self.files} files ({of_each})"


def sample(root: int, sent: int) -> Sample:
    """Look at a process and all that it has started.

    Args:
        root: Process id.
        sent: Requests so far.
    """
    seen = []
    process = psutil.Process(root)
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            memory = each.memory_info()
            mib = (memory.rss - memory.shared) / 2**20
            # one with a title of its own has nothing else there
            name = Path(*each.cmdline()[:1]).name
            seen.append(OneProcess(each.pid, name, mib, each.num_fds()))
    return Sample(
        round(sum(one.mib for one in seen), 1),
        sum(one.files for one in seen),
        *(len(seen), sent, tuple(seen)),
    )


def faults_of(samples: list[Sample]) -> list[str]:
    """Return what has grown since the first sample, in words.

    Memory is compared with the first sample behind `WARM` requests, of all processes
    together and of each by itself.
    """
    if len(samples) < 2:
        return []
    first, last = samples[0], samples[-1]
    points = [_Point(one.sent, one.mib, one.files) for one in samples]
    faults = _growth("", points)
    if last.processes != first.processes:
        faults.append(f"{first.processes} processes became {last.processes}")
    for one in first.each:
        points = [
            _Point(sample.sent, same.mib, same.files)
            for sample in samples
            for same in sample.each
            if same.pid == one.pid
        ]
        faults += _growth(f"{one.name} ({one.pid}): ", points)
    return faults


class _Point(NamedTuple):
    sent: int
    mib: float
    files: int


def _growth(whose: str, points: list[_Point]) -> list[str]:
    if len(points) < 2:
        return []
    faults = []
    warm = [each for each in points if each.sent >= WARM]
    if len(warm) > 1:
        # the least of the last two: one may have caught something in passing
        mib = min(each.mib for each in warm[1:][-2:])
        if mib > warm[0].mib * (1 + GROWTH) + SLACK_MIB:
            faults.append(f"{whose}memory grew from {warm[0].mib:.0f} to {mib:.0f} MiB")
    files = min(each.files for each in points[1:][-2:])
    if files > points[0].files + MORE_FILES:
        faults.append(f"{whose}open files grew from {points[0].files} to {files}")
    return faults
