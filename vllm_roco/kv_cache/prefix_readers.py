# SPDX-License-Identifier: Apache-2.0
"""Requests that are reading their prompts, so that others need not read the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request


@dataclass(eq=False)
class Reader:
    """A running request with places of its prompt ahead.

    Attributes:
        request: The request.
        places: Lengths at which a snapshot could be made.
        prefixes: Hashes of the prompt up to there.
        next_place: Index of the first place that it has not gone past.
    """

    request: Request
    places: Sequence[int]
    prefixes: Sequence[BlockHash]
    next_place: int = 0


class PrefixReaders:
    """Who reads which prefix, and which of them are waited for.

    Attributes:
        num_changes: How often a request has begun to read, or ended before its time.
    """

    def __init__(self) -> None:
        self.num_changes = 0
        self._readers: dict[str, Reader] = {}
        # who reads a prefix, in the order in which they have begun
        self._readers_of: dict[BlockHash, list[Reader]] = {}
        self._wanted: set[BlockHash] = set()
        # of those that are chosen for the step being scheduled, where it ends
        self._ends: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._readers)

    def begin(
        self, request: Request, places: Sequence[int], prefixes: Sequence[BlockHash]
    ) -> None:
        """Note that a request is let in, with places of its prompt before it.

        Args:
            request: The request.
            places: Lengths at which a snapshot could be made.
            prefixes: Hashes of the prompt up to there.
        """
        reader = Reader(request, places, prefixes)
        self._readers[request.request_id] = reader
        self.num_changes += 1
        for prefix in prefixes:
            self._readers_of.setdefault(prefix, []).append(reader)

    def choose(self, request_id: str, end: int) -> None:
        """Note where the step being scheduled ends for a request."""
        self._ends[request_id] = end

    def reader_of(self, prefix: BlockHash, length: int) -> Request | None:
        """Return the request that is on its way to a prefix's end, or stands there.

        The first one that has begun. Not one whose step goes past that end.

        Args:
            prefix: Its hash.
            length: Its tokens.
        """
        for reader in self._readers_of.get(prefix, ()):
            request = reader.request
            start = request.num_computed_tokens
            end = self._ends.get(request.request_id, start)
            if start == length or start < length and end <= length:
                return request
        return None

    def next_places(self) -> Iterator[tuple[int, BlockHash]]:
        """Yield of each reader the first place that it has not gone past.

        Who shares any place ahead of a reader shares this one: places up to a length
        depend on the tokens up to there, and a hash stands for all of these.

        Yields:
            Length and hash of the prefix.
        """
        for reader in self._readers.values():
            yield reader.places[reader.next_place], reader.prefixes[reader.next_place]

    def want(self, prefix: BlockHash) -> None:
        """Ask for a snapshot of a prefix that is being read."""
        self._wanted.add(prefix)

    def is_wanted(self, prefix: BlockHash) -> bool:
        """Return whether another request waits for a prefix."""
        return prefix in self._wanted

    def arrivals(self) -> Iterator[tuple[Request, int, BlockHash]]:
        """Move all readers on, and yield who stands at a place now.

        To be asked once in a step, when its requests are chosen and their lengths not
        yet moved on: who is chosen starts the step there.

        Yields:
            Request, length and hash of the prefix.
        """
        for reader in list(self._readers.values()):
            length = reader.request.num_computed_tokens
            places, index = reader.places, reader.next_place
            while index < len(places) and places[index] <= length:
                prefix = reader.prefixes[index]
                if places[index] == length:
                    yield reader.request, length, prefix
                    self._arrive(reader, prefix)
                else:
                    self._leave(reader, prefix)
                index += 1
            reader.next_place = index
            if index == len(places):
                del self._readers[reader.request.request_id]
        self._ends.clear()

    def drop(self, request_id: str) -> None:
        """Forget a request that reads no more."""
        self._ends.pop(request_id, None)
        reader = self._readers.pop(request_id, None)
        if reader is not None:
            self.num_changes += 1
            for prefix in reader.prefixes[reader.next_place :]:
                self._leave(reader, prefix)

    def _arrive(self, reader: Reader, prefix: BlockHash) -> None:
        readers = self._readers_of.get(prefix)
        if readers is None or readers[0] is not reader:
            self._leave(reader, prefix)
            return
        # a snapshot is there now, or there is none to be had
        del self._readers_of[prefix]
        self._wanted.discard(prefix)

    def _leave(self, reader: Reader, prefix: BlockHash) -> None:
        """Let another one that reads a prefix take over, if there is one."""
        readers = self._readers_of.get(prefix, [])
        if reader in readers:
            readers.remove(reader)
            if not readers:
                del self._readers_of[prefix]
                self._wanted.discard(prefix)
