# SPDX-License-Identifier: Apache-2.0
"""Memory and file descriptors of an engine's processes, as Linux counts them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil

GROWTH = 0.05
"""By how much memory may grow after the first tenth; allocators keep some."""
SLACK_MIB = 48
WARM = 1000
"""Requests until all buffers of an engine have seen their largest batches."""
MORE_FILES = 8
"""Descriptors that may be open more: connections which are about to be closed."""


@dataclass(frozen=True)
class Sample:
    """All processes together, at rest.

    Attributes:
        mib: Resident memory that is theirs alone, in MiB.
        files: Open file descriptors.
        processes: How many there are.
        sent: Requests until then.
        mib_of_each: Of every process, in the order in which they were started.
    """

    mib: float
    files: int
    processes: int
    sent: int
    mib_of_each: tuple[int, ...] = ()


def sample(root: int, sent: int) -> Sample:
    """Look at a process and all that it has started.

    Args:
        root: Process id.
        sent: Requests so far.
    """
    sizes, files = [], 0
    process = psutil.Process(root)
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            memory = each.memory_info()
            sizes.append((memory.rss - memory.shared) / 2**20)
            files += each.num_fds()
    each_size = tuple(map(round, sizes))
    return Sample(round(sum(sizes), 1), files, len(sizes), sent, each_size)


def faults_of(samples: list[Sample]) -> list[str]:
    """Return what has grown since the first sample, in words.

    Memory is compared with the first sample behind `WARM` requests.
    """
    if len(samples) < 2:
        return []
    first, *others = samples
    faults = []
    warm = [each for each in samples if each.sent >= WARM]
    if len(warm) > 1:
        # the least of the last two: one may have caught something in passing
        last = min(warm[1:][-2:], key=lambda each: each.mib)
        if last.mib > warm[0].mib * (1 + GROWTH) + SLACK_MIB:
            faults.append(f"memory grew from {warm[0]} to {last}")
    files = min(each.files for each in others[-2:])
    if files > first.files + MORE_FILES:
        faults.append(f"open files grew from {first.files} to {files}")
    if others[-1].processes != first.processes:
        faults.append(f"{first.processes} processes became {others[-1].processes}")
    return faults
