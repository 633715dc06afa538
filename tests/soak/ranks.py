# SPDX-License-Identifier: Apache-2.0
"""Compares what the ranks of an engine have read and kept, step by step."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.soak.rank_steps import Eviction, Step, from_json, rank_file

_PATIENCE = 30
"""Seconds in which every rank must have come to the end of what it was told."""


class Ranks:
    """Those of one engine.

    Args:
        audit: The file of `tests.soak.audit`; those of the ranks lie beside it.
        tensor: Ranks that share each layer's heads.
        pipeline: Stages that share the layers.
        agree: Whether the ranks of a stage choose together.
    """

    def __init__(self, audit: Path, tensor: int, pipeline: int, *, agree: bool) -> None:
        self._tensor, self._agree = tensor, agree
        self._files = [rank_file(audit, rank) for rank in range(tensor * pipeline)]
        self._offsets = [0] * len(self._files)
        self._waiting: list[deque[Step]] = [deque() for _ in self._files]
        self.counts = [Counter[str]() for _ in self._files]

    async def compare(self) -> list[str]:
        """Compare what is new since the last time, of an engine at rest.

        Returns:
            What is wrong, in words.
        """
        deadline = time.monotonic() + _PATIENCE
        while True:
            self._read()
            numbers = [counts["steps"] for counts in self.counts]
            if len({*numbers}) == 1 or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        faults = []
        if len({*numbers}) != 1:
            faults.append(f"the ranks have taken {numbers} steps")
        for steps in zip(*self._waiting, strict=False):
            faults += differences(steps, self._tensor, agree=self._agree)
        for waiting in self._waiting:
            waiting.clear()
        return faults

    def _read(self) -> None:
        for rank, path in enumerate(self._files):
            with path.open("rb") as file:
                file.seek(self._offsets[rank])
                lines = file.read()
            # the last may not be written to its end
            whole = lines[: lines.rfind(b"\n") + 1]
            self._offsets[rank] += len(whole)
            for line in whole.splitlines():
                step = from_json(line)
                self._waiting[rank].append(step)
                counts = self.counts[rank]
                counts["steps"] += 1
                counts["steps that evict"] += bool(step.evictions)
                counts["evictions"] += len(step.evictions)


def differences(steps: Sequence[Step], tensor: int, *, agree: bool) -> Iterator[str]:
    """Yield what is wrong with what the ranks did in one step.

    Args:
        steps: Of all ranks, those of a stage beside each other.
        tensor: Ranks of a stage.
        agree: Whether these choose together.
    """
    first = steps[0]
    for rank, step in enumerate(steps):
        where = f"step {first.number}, rank {rank}"
        for fault in step.faults:
            yield f"{where}: {fault}"
        for what in ("number", "requests", "tables"):
            own, other = getattr(step, what), getattr(first, what)
            if own != other:
                yield f"{where} has the {what} {own}, rank 0 {other}"
        own, other = map(_when, step.evictions), map(_when, first.evictions)
        if [*own] != [*other]:
            yield f"{where} evicts {step.evictions}, rank 0 {first.evictions}"
            continue
        stage = rank // tensor * tensor
        for own, alike, peer in zip(
            step.evictions, first.evictions, steps[stage].evictions, strict=True
        ):
            if agree and (own.kept, own.queries) != (peer.kept, peer.queries):
                yield f"{where} has {own}, rank {stage} {peer}"
            elif own.alike and own.kept != alike.kept:
                yield f"{where} has {own} by no share, rank 0 {alike}"


def _when(eviction: Eviction) -> tuple[object, ...]:
    return eviction.request, eviction.num_tokens, eviction.evicted, len(eviction.kept)
