# SPDX-License-Identifier: Apache-2.0
"""How an engine's processes show their numbers to its front end.

vLLM gives a plugin no field in the statistics that travel from the engine core to the
front end, so each process that counts keeps its numbers in files of its own, which the
front end reads whenever somebody asks. Publishing costs the scheduler a look at the
clock, and a store for each number that has changed.
"""

from __future__ import annotations

import dataclasses
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_roco.observability.families import (
    BUDGET,
    FREED_BLOCKS,
    MAX_SEQUENCE,
    MOVED_BLOCKS,
    PEAK_BOUND,
    PEAK_SEQUENCE,
    PREFIX_FAMILIES,
    REQUEST_BOUND,
    PrefixCounts,
)
from vllm_roco.observability.file import NumbersFile, find_files, read_file, sweep
from vllm_roco.observability.file_names import FileName, instance_name
from vllm_roco.observability.places import places, times_of_change
from vllm_roco.observability.warning import logger, warn_of_end

CHECK_SECONDS = 1.0
"""How often a process looks whether its files are still there, at most."""

TICK_NANOSECONDS = 20_000_000
"""Changes of a directory that are so close may have one time: ticks are 1 to 10 ms."""


class MetricsPublisher:
    """The engine core's side: owns three files and writes its numbers.

    Not thread-safe: one thread, the scheduler's, publishes.

    Args:
        instance_id: `VllmConfig.instance_id`, which the front end's copy of the
            configuration shares.
        engine: Data-parallel index of this engine core.
        model_name: Served name of the model.
        budget_tokens: The option `budget`.

    Raises:
        OSError: There is no place where the files can be written.
    """

    def __init__(
        self, *, instance_id: str, engine: int, model_name: str, budget_tokens: int
    ) -> None:
        counter = FileName.of_this_core("counter", instance_id, engine)
        self._freed, self._max, self._peak, self._peak_bound, moved, budget = (
            family.key(model_name, engine)
            for family in (
                FREED_BLOCKS,
                MAX_SEQUENCE,
                PEAK_SEQUENCE,
                PEAK_BOUND,
                MOVED_BLOCKS,
                BUDGET,
            )
        )
        # workers add what they move, but 0 is shown before
        counts = {self._freed: 0, moved: 0}
        sizes = {self._max: 0, self._peak: 0, self._peak_bound: 0}
        sizes[budget] = budget_tokens
        prefix_keys = [family.key(model_name, engine) for family in PREFIX_FAMILIES]
        for family, key in zip(PREFIX_FAMILIES, prefix_keys, strict=True):
            (counts if family.is_counter else sizes)[key] = 0
        self._bucket_keys, self._bounds_key = REQUEST_BOUND.keys(model_name, engine)
        # of each bucket, and the sum at the end
        self._bounds = [0] * (len(self._bucket_keys) + 1)
        self._largest_bound = 0
        buckets = dict.fromkeys((*self._bucket_keys, self._bounds_key), 0)
        self._counters, self._gauges, self._buckets = self._files = _open(
            counter, {"counter": counts, "gauge_max": sizes, "histogram": buckets}
        )
        self._prefix_numbers = [
            (self._counters if key in counts else self._gauges, key)
            for key in prefix_keys
        ]
        self._prefix_counts = PrefixCounts()
        # freed blocks, most tokens now, and ever
        self._published = [0, 0, 0]
        self._due = 0.0

    def publish(self, freed_blocks: int, max_sequence_kv_tokens: int) -> None:
        """Show new numbers; call it whenever the scheduler may have changed them.

        Args:
            freed_blocks: Blocks given back by the budget since the engine started.
            max_sequence_kv_tokens: Most KV tokens one running sequence holds now:
                blocks held times block size, 0 when nothing runs.

        Raises:
            OSError: Somebody has removed a file, and it cannot be written anew.
        """
        published = self._published
        if freed_blocks != published[0]:
            published[0] = freed_blocks
            self._counters.set(self._freed, freed_blocks)
        if max_sequence_kv_tokens != published[1]:
            published[1] = max_sequence_kv_tokens
            self._gauges.set(self._max, max_sequence_kv_tokens)
            if max_sequence_kv_tokens > published[2]:
                published[2] = max_sequence_kv_tokens
                self._gauges.set(self._peak, max_sequence_kv_tokens)
        now = time.monotonic()
        if now >= self._due:
            self._due = now + CHECK_SECONDS
            for file in self._files:
                file.keep()

    def count_request(self, bound_tokens: int) -> None:
        """Show one request more; as `publish`, but never raises.

        Args:
            bound_tokens: Most KV tokens that it may come to hold.
        """
        bounds = self._bounds
        bucket = bisect_left(REQUEST_BOUND.bounds, bound_tokens)
        bounds[bucket] += 1
        bounds[-1] += bound_tokens
        self._buckets.set(self._bucket_keys[bucket], bounds[bucket])
        self._buckets.set(self._bounds_key, bounds[-1])
        if bound_tokens > self._largest_bound:
            self._largest_bound = bound_tokens
            self._gauges.set(self._peak_bound, bound_tokens)

    def publish_prefixes(self, counts: PrefixCounts) -> None:
        """Show new numbers of the prefix cache; as `publish`, but never raises."""
        published = self._prefix_counts
        if counts == published:
            return
        self._prefix_counts = counts
        for (file, key), number, before in zip(
            self._prefix_numbers, counts, published, strict=True
        ):
            if number != before:
                file.set(key, number)

    def close(self) -> None:
        """Remove the files. Closing twice is harmless."""
        for file in self._files:
            file.close()


class MovedBlocks:
    """A worker's side: counts blocks copied over evicted ones, in a file beside.

    One worker of an engine counts: tensor-parallel rank 0 of the first pipeline stage.
    The others move blocks in the same steps, but stages choose by their own layers, and
    ranks that do not agree by their own heads, so that their numbers may differ a
    little. One thread, the worker's own, writes.
    Nothing here raises: where a file cannot be written, counting ends with a warning.

    Args:
        instance_id: `VllmConfig.instance_id`.
        engine: Data-parallel index of the worker's engine core.
    """

    def __init__(self, instance_id: str, engine: int) -> None:
        self._engine = instance_name(instance_id), engine
        self._file: NumbersFile | None = None
        self._key = ""
        self._count = 0
        self._due = 0.0
        self._ended = False
        # where the last look for the core's files was, and what had changed there when
        self._directories: Sequence[Path] = ()
        self._changes: Sequence[int] | None = None

    def connect(self) -> bool:
        """Return whether moves count by now.

        The engine core makes its files when it is about to serve. What workers move
        before, in warm-up runs, is nobody's block. To be asked in each step: while
        there are no such files, a look for them is due when a file has come or gone,
        and each `CHECK_SECONDS`.
        """
        if self._file is None and not self._ended and self._is_look_due():
            try:
                self._find_core()
            except (OSError, ValueError) as error:
                self._end(error)
        return self._file is not None

    def add(self, num_blocks: int) -> None:
        """Count more blocks, or none of them before `connect` would succeed."""
        if not num_blocks or not self.connect():
            return
        assert self._file is not None
        self._count += num_blocks
        try:
            self._file.set(self._key, self._count)
            if (now := time.monotonic()) >= self._due:
                self._due = now + CHECK_SECONDS
                self._file.keep()
        except (OSError, ValueError) as error:
            self._end(error)

    def _is_look_due(self) -> bool:
        now, changes = time.monotonic(), times_of_change(self._directories)
        if now < self._due and changes == self._changes:
            return False
        self._due = now + CHECK_SECONDS
        self._directories = [place.path for place in places()]
        self._changes = times_of_change(self._directories)
        if abs(time.time_ns() - max(self._changes)) < TICK_NANOSECONDS:
            # another change at this tick would not show. One after the clock was set
            # back does: its time lies before the last one's
            self._changes = None
        return True

    def _find_core(self) -> None:
        for place, name in find_files():
            is_core = name.kind == "counter" and name.writer == "core"
            if not is_core or (name.instance, name.engine) != self._engine:
                continue
            for number in read_file(place, name):
                if number.sample_name == MOVED_BLOCKS.sample_name:
                    self._key = MOVED_BLOCKS.key(number.model_name, number.engine)
                    self._file = NumbersFile(
                        place, name.of_a_worker(), {self._key: self._count}
                    )
                    return

    def _end(self, error: Exception) -> None:
        self._ended, self._file = True, None
        warn_of_end("the metric of moved blocks", error)


def _open(
    counter: FileName, numbers: Mapping[str, Mapping[str, float]]
) -> list[NumbersFile]:
    """Return the files of an engine core, in the best place that takes them.

    Args:
        counter: What the file of counters is called.
        numbers: What is in each file, by the file's kind.
    """
    troubles = []
    for place in places():
        try:
            files = [
                NumbersFile(place, dataclasses.replace(counter, kind=kind), of_kind)
                for kind, of_kind in numbers.items()
            ]
        except OSError as error:
            troubles.append(str(error))
            continue
        if troubles:
            logger.warning(
                "roco: the metrics lie in %s, because %s.",
                place.path,
                "; ".join(troubles),
            )
        sweep(place)
        return files
    raise OSError(
        f"{'; '.join(troubles)}. Set TMPDIR to a directory of your own to have them"
    )
