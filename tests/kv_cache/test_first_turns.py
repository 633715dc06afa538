# SPDX-License-Identifier: Apache-2.0
"""Whether first turns go on, told by what became of their ends in vLLM's block pool."""

from __future__ import annotations

import pytest
from pytest import MonkeyPatch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
)

from vllm_roco.kv_cache import first_turns
from vllm_roco.kv_cache.first_turns import (
    LEAST_OUTCOMES,
    NUM_OUTCOMES,
    TRIES,
    FirstTurns,
)
from vllm_roco.kv_cache.snapshots import SnapshotStore

SIZE = 5
"""Blocks that a conversation leaves; the pool has room for four."""


class Chats:
    """Conversations whose first turns end, one after the other, by their numbers."""

    def __init__(self) -> None:
        # one more is the null block
        self.pool = BlockPool(4 * SIZE + 1, enable_caching=True, hash_block_size=16)
        self.store = SnapshotStore(self.pool)
        self.first_turns = FirstTurns(self.store)
        self.num_others = 0

    @staticmethod
    def key(number: int) -> BlockHash:
        return BlockHash(number.to_bytes(32, "big"))

    def end(self, *numbers: int) -> None:
        """Let first turns end, and leave what they hold."""
        for number in numbers:
            live = self.pool.get_new_blocks(SIZE)
            self.store.keep(self.key(number), live)
            self.first_turns.keep(self.key(number))
            # as vLLM lets go of a sequence
            self.pool.free_blocks(reversed(live))

    def go_on(self, *numbers: int) -> None:
        """Let second turns begin where the first ones ended."""
        for number in numbers:
            snapshot = self.store.find(self.key(number))
            assert snapshot is not None
            self.pool.touch(snapshot.blocks)
            self.store.count_hit(self.key(number), SIZE * 16)
            self.first_turns.hit(self.key(number))
            self.pool.free_blocks(reversed(snapshot.blocks))

    def push_out(self, num_blocks: int = 4 * SIZE) -> None:
        """Let others use the memory, of all conversations or the oldest ones."""
        self.pool.free_blocks(self.pool.get_new_blocks(num_blocks))

    def answers(self, num_asked: int) -> list[bool]:
        """Ask for so many first turns whether they are taken to go on."""
        return [self.first_turns.take_next() for _ in range(num_asked)]

    @property
    def is_enough(self) -> bool:
        """Whether that is so beside those that are tried in any case."""
        # of two in a row one is not tried
        return all(self.answers(2))


@pytest.fixture
def chats(monkeypatch: MonkeyPatch) -> Chats:
    """Chats of which the first outcome counts."""
    monkeypatch.setattr(first_turns, "LEAST_OUTCOMES", 1)
    return Chats()


def pushed_out(chats: Chats, *numbers: int) -> None:
    for number in numbers:
        chats.end(number)
        chats.push_out()
        # as the next one comes
        chats.answers(1)


def test_as_long_as_nothing_is_known_all_are_taken_to_go_on(chats: Chats) -> None:
    assert all(chats.answers(2 * TRIES))
    # still there, or asked for in vain
    chats.end(1, 2, 3)
    chats.first_turns.hit(chats.key(9))
    assert all(chats.answers(2 * TRIES))


def test_a_few_that_are_pushed_out_show_nothing() -> None:
    chats = Chats()
    pushed_out(chats, *range(LEAST_OUTCOMES - 1))
    assert chats.is_enough
    pushed_out(chats, LEAST_OUTCOMES)
    assert not chats.is_enough


def test_an_emptied_cache_shows_nothing(chats: Chats) -> None:
    chats.end(1, 2, 3)
    assert chats.pool.reset_prefix_cache()
    chats.first_turns.forget()
    assert all(chats.answers(2 * TRIES))


def test_one_in_so_many_is_tried_where_none_goes_on(chats: Chats) -> None:
    chats.end(1, 2, 3, 4)
    chats.push_out()
    expected = [number % TRIES == 0 for number in range(1, 3 * TRIES + 1)]
    assert chats.answers(3 * TRIES) == expected


@pytest.mark.parametrize(
    ("num_gone", "expected"), [(0, True), (3, True), (4, False)], ids=str
)
def test_one_of_four_is_enough(chats: Chats, num_gone: int, *, expected: bool) -> None:
    chats.end(0)
    chats.go_on(0)
    pushed_out(chats, *range(1, num_gone + 1))
    assert chats.is_enough == expected


def test_only_those_that_are_gone_are_counted(chats: Chats) -> None:
    """The oldest goes first, as vLLM hands out the first of its free queue."""
    chats.end(1, 2, 3, 4)
    chats.go_on(2)
    # of the first one a single block; the second one has gone on, and is the last
    chats.push_out(1)
    # one of two
    assert chats.is_enough
    # what is left of it, and the first block of the third one
    chats.push_out(SIZE)
    # one of three
    assert chats.is_enough
    # the last one is still there
    chats.go_on(4)
    pushed_out(chats, 5, 6, 7, 8)
    # two of eight
    assert chats.is_enough
    pushed_out(chats, 9)
    assert not chats.is_enough


def test_who_has_gone_on_is_counted_once(chats: Chats) -> None:
    chats.end(1)
    # the second turn asked again, and then pushed out
    chats.go_on(1, 1)
    chats.push_out()
    pushed_out(chats, 2, 3, 4)
    assert chats.is_enough
    pushed_out(chats, 5)
    assert not chats.is_enough


def test_the_last_ones_decide(chats: Chats) -> None:
    """So it is noticed when chats begin to go on, or cease to."""
    pushed_out(chats, *range(2 * NUM_OUTCOMES))
    for number in range(NUM_OUTCOMES // 4):
        assert not chats.is_enough
        chats.end(number)
        chats.go_on(number)
    assert chats.is_enough
    pushed_out(chats, *range(100, 100 + 3 * NUM_OUTCOMES // 4))
    assert chats.is_enough
    pushed_out(chats, 99)
    assert not chats.is_enough


def test_no_more_are_awaited_than_that(chats: Chats, monkeypatch: MonkeyPatch) -> None:
    """However much memory there is, and none is taken for pushed out for that."""
    monkeypatch.setattr(first_turns, "MAX_KEPT", 2)
    chats.end(1, 2, 3, 4)
    assert all(chats.answers(2 * TRIES))
    # nobody remembers the first two
    chats.go_on(1, 2)
    chats.push_out()
    assert chats.answers(TRIES).count(True) == 1
