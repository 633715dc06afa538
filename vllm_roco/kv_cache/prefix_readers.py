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
    places: range
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
        self._reader_of: dict[BlockHash, Reader] = {}
        # who reads the same prefixes and has begun later, in order
        self._others: dict[BlockHash, list[Reader]] = {}
        self._wanted: set[BlockHash] = set()

    def __bool__(self) -> bool:
        return bool(self._readers)

    def begin(
        self, request: Request, places: range, prefixes: Sequence[BlockHash]
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
            if self._reader_of.setdefault(prefix, reader) is not reader:
                self._others.setdefault(prefix, []).append(reader)

    def reader_of(self, prefix: BlockHash) -> Request | None:
        """Return the request that is on its way to the end of a prefix."""
        reader = self._reader_of.get(prefix)
        return None if reader is None else reader.request

    def is_at(self, prefix: BlockHash) -> bool:
        """Return whether the one that reads a prefix has read it, and no more.

        To be asked until a step's requests are chosen, see `arrivals`.
        """
        reader = self._reader_of.get(prefix)
        if reader is None:
            return False
        places, length = reader.places, reader.request.num_computed_tokens
        return length in places and reader.prefixes[places.index(length)] == prefix

    def want(self, prefix: BlockHash) -> None:
        """Ask for a snapshot of a prefix that is being read."""
        self._wanted.add(prefix)

    def is_wanted(self, prefix: BlockHash) -> bool:
        """Return whether another request waits for a prefix."""
        return prefix in self._wanted

    def arrivals(self) -> Iterator[tuple[Request, int, BlockHash]]:
        """Move all readers on, and yield who stands at a place now.

        To be asked when a step's requests are chosen and their lengths not yet moved
        on: who is chosen starts the step there.

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
                self._go_past(reader, prefix)
                index += 1
            reader.next_place = index
            if index == len(places):
                del self._readers[reader.request.request_id]

    def drop(self, request_id: str) -> None:
        """Forget a request that reads no more."""
        reader = self._readers.pop(request_id, None)
        if reader is not None:
            self.num_changes += 1
            for prefix in reader.prefixes[reader.next_place :]:
                self._give_up(reader, prefix)

    def _go_past(self, reader: Reader, prefix: BlockHash) -> None:
        if self._reader_of.get(prefix) is reader:
            del self._reader_of[prefix]
            # those that waited for the first one wait no more
            self._others.pop(prefix, None)
            self._wanted.discard(prefix)
        else:
            self._leave_others(reader, prefix)

    def _give_up(self, reader: Reader, prefix: BlockHash) -> None:
        if self._reader_of.get(prefix) is not reader:
            self._leave_others(reader, prefix)
        elif prefix in self._others:
            self._reader_of[prefix] = self._others[prefix][0]
            self._leave_others(self._others[prefix][0], prefix)
        else:
            del self._reader_of[prefix]
            self._wanted.discard(prefix)

    def _leave_others(self, reader: Reader, prefix: BlockHash) -> None:
        others = self._others.get(prefix)
        if others is not None and reader in others:
            others.remove(reader)
            if not others:
                del self._others[prefix]
