# SPDX-License-Identifier: Apache-2.0
"""Snapshots in vLLM's own block pool."""

from __future__ import annotations

import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from vllm_roco.kv_cache import snapshots
from vllm_roco.kv_cache.snapshots import SnapshotStore

NUM_BLOCKS = 21


@pytest.fixture
def pool() -> BlockPool:
    # one more is the null block
    return BlockPool(NUM_BLOCKS + 1, enable_caching=True, hash_block_size=16)


def prefix(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "big"))


def publish(
    store: SnapshotStore, pool: BlockPool, number: int, size: int = 5
) -> list[KVCacheBlock]:
    """Publish what a sequence holds that ends after the step; return the copies."""
    live = pool.get_new_blocks(size)
    copies = store.publish(prefix(number), live)
    pool.free_blocks([block for pair in copies for block in pair])
    pool.free_blocks(live)
    return [target for _, target in copies]


def test_a_snapshot_counts_as_free_memory(pool: BlockPool) -> None:
    store = SnapshotStore(pool)
    copies = publish(store, pool, 1)
    assert len(copies) == 5
    assert pool.get_num_free_blocks() == NUM_BLOCKS
    assert pool.get_usage() == 0
    snapshot = store.find(prefix(1))
    assert snapshot is not None
    assert snapshot.blocks == copies
    assert (store.num_published, store.num_alive, store.num_dead) == (1, 1, 0)
    assert store.find(prefix(2)) is None


def test_each_prefix_has_one_snapshot(pool: BlockPool) -> None:
    store = SnapshotStore(pool)
    publish(store, pool, 1)
    assert publish(store, pool, 1) == []
    assert store.num_published == 1


def test_copies_hold_both_ends(pool: BlockPool) -> None:
    store = SnapshotStore(pool)
    live = pool.get_new_blocks(4)
    copies = store.publish(prefix(1), live)
    assert [source for source, _ in copies] == live
    assert [source.ref_cnt for source, _ in copies] == [2] * 4
    assert [target.ref_cnt for _, target in copies] == [1] * 4
    # the sequence ends before vLLM knows that the copy has run
    pool.free_blocks(live)
    assert pool.get_num_free_blocks() == NUM_BLOCKS - 8


def test_who_ends_leaves_its_own_blocks(pool: BlockPool) -> None:
    store = SnapshotStore(pool)
    live, same = pool.get_new_blocks(5), pool.get_new_blocks(5)
    for blocks in (live, same):
        store.keep(prefix(1), blocks)
        # as vLLM lets go of a sequence
        pool.free_blocks(reversed(blocks))
    assert pool.get_num_free_blocks() == NUM_BLOCKS
    snapshot = store.find(prefix(1))
    assert snapshot is not None
    assert snapshot.blocks == live
    assert (store.num_published, store.num_alive) == (1, 1)
    # all blocks but these, and then its last one
    pool.get_new_blocks(NUM_BLOCKS - 5)
    assert store.num_alive == 1
    assert pool.get_new_blocks(1) == live[-1:]
    assert store.num_alive == 0
    assert store.find(prefix(1)) is None


def test_without_enough_free_blocks_there_is_none(pool: BlockPool) -> None:
    store = SnapshotStore(pool)
    live = pool.get_new_blocks(11)
    assert store.publish(prefix(1), live) == []
    assert [block.ref_cnt for block in live] == [1] * 11
    assert store.num_alive == store.num_published == 0


def test_the_least_recently_used_goes_first(pool: BlockPool) -> None:
    store = SnapshotStore(pool)
    for number in (1, 2, 3):
        publish(store, pool, number)
    hit = store.find(prefix(1))
    assert hit is not None
    # as a request that begins with it does
    pool.touch(hit.blocks)
    store.count_hit(prefix(1), 80)
    pool.free_blocks(hit.blocks)
    # six blocks belong to no snapshot, and the seventh is the second one's first
    taken = pool.get_new_blocks(7)
    assert store.num_alive == 2
    assert store.find(prefix(2)) is None
    assert store.find(prefix(1)) is not None
    assert store.find(prefix(3)) is not None
    pool.free_blocks(taken)
    assert (store.num_hits, store.num_saved_tokens) == (1, 80)


def test_one_made_while_requests_are_let_in_goes_behind_one_that_is_hit(
    pool: BlockPool,
) -> None:
    """The oldest was looked for in another order than vLLM's free queue has."""
    store = SnapshotStore(pool)
    publish(store, pool, 1)
    live = pool.get_new_blocks(5)
    copies = store.publish(prefix(2), live)
    hit = store.find(prefix(1))
    assert hit is not None
    pool.touch(hit.blocks)
    store.count_hit(prefix(1), 80)
    pool.free_blocks(hit.blocks)
    # all are chosen, and the copies become free
    store.renew(prefix(2))
    pool.free_blocks([target for _, target in copies])
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 9)
    assert hit.blocks[0] in taken
    assert store.num_alive == 1
    assert store.find(prefix(2)) is not None


@pytest.mark.parametrize("lost", range(5))
def test_any_block_that_is_handed_out_ends_a_snapshot(
    pool: BlockPool, lost: int
) -> None:
    store = SnapshotStore(pool)
    copies = publish(store, pool, 1)
    pool.evict_blocks({copies[lost].block_id})
    assert store.find(prefix(1)) is None
    assert store.num_dead == 1
    assert publish(store, pool, 1)
    assert store.find(prefix(1)) is not None


def test_new_names_do_not_revive_old_blocks(pool: BlockPool) -> None:
    """The blocks of a dead snapshot bear its name until they are handed out."""
    store = SnapshotStore(pool)
    old = publish(store, pool, 1)
    pool.evict_blocks({old[0].block_id})
    new = publish(store, pool, 1)
    names = {block.block_hash for block in new}
    assert len(names) == 1
    assert not names & {block.block_hash for block in old if block not in new}


def test_a_reset_ends_all(pool: BlockPool) -> None:
    store = SnapshotStore(pool)
    publish(store, pool, 1)
    publish(store, pool, 2)
    assert pool.reset_prefix_cache()
    assert store.find(prefix(2)) is None
    assert store.num_alive == 0


def test_dead_ones_are_forgotten_unasked(pool: BlockPool) -> None:
    store = SnapshotStore(pool)
    for number in range(1000):
        publish(store, pool, number)
    assert store.num_alive <= NUM_BLOCKS // 5
    assert len(store._snapshots) <= NUM_BLOCKS // 5


@pytest.mark.parametrize("is_counted", [False, True])
def test_a_count_of_the_living_changes_no_other_count(
    pool: BlockPool, is_counted: bool
) -> None:
    """Whoever counted forgot the dead, and no look-up found one again."""
    store = SnapshotStore(pool)
    for number in (1, 2, 3):
        publish(store, pool, number)
    taken = pool.get_new_blocks(13)
    if is_counted:
        assert store.num_alive == 1
    for _ in range(2):
        assert [store.find(prefix(n)) is None for n in (1, 2, 3)] == [True, True, False]
        assert store.num_dead == 2
    pool.free_blocks(taken)
    publish(store, pool, 1)
    assert store.find(prefix(1)) is not None
    assert store.num_dead == 2


def test_only_so_many_dead_ones_are_remembered(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MAX_LOST", 4)
    store = SnapshotStore(pool)
    for number in range(100):
        publish(store, pool, number)
    assert len(store._lost) == 4
    assert store.find(prefix(0)) is None
    assert store.num_dead == 0


def test_vllm_hears_of_no_removed_prefix() -> None:
    """Nobody was told of one: a snapshot's name means nothing outside."""
    pool = BlockPool(
        NUM_BLOCKS + 1,
        enable_caching=True,
        hash_block_size=16,
        enable_kv_cache_events=True,
    )
    store = SnapshotStore(pool)
    for number in range(10):
        publish(store, pool, number)
    assert pool.take_events() == []


def test_what_is_hit_again_and_again_is_in_demand(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MOST_IN_DEMAND", 0.5)
    store = SnapshotStore(pool)
    for number in (1, 2, 3):
        publish(store, pool, number)
        store.count_hit(prefix(number), 80)
    assert store.num_blocks_in_demand(None, NUM_BLOCKS) == 0
    store.count_hit(prefix(1), 80)
    store.count_hit(prefix(2), 80)
    assert store.num_blocks_in_demand(None, NUM_BLOCKS) == 10
    assert store.num_blocks_in_demand(prefix(1), NUM_BLOCKS) == 5
    assert store.num_blocks_in_demand(prefix(3), NUM_BLOCKS) == 10
    # of 22 blocks no more than half
    store.count_hit(prefix(3), 80)
    assert store.num_blocks_in_demand(None, NUM_BLOCKS) == 11
    # vLLM takes a block of the first one
    pool.get_new_blocks(NUM_BLOCKS - 14)
    assert store.num_blocks_in_demand(None, NUM_BLOCKS) == 10


def test_nothing_is_counted_where_memory_is_ample(pool: BlockPool) -> None:
    """With 32 snapshots in demand each admission and each snapshot took 23 us more."""
    store = SnapshotStore(pool)
    publish(store, pool, 1, size=4)
    for _ in range(2):
        store.count_hit(prefix(1), 64)
    # of 22 blocks five may be kept
    assert store.num_blocks_in_demand(None, NUM_BLOCKS - 5) == 0
    assert store.num_blocks_in_demand(None, NUM_BLOCKS - 4) == 4


def test_nothing_is_published_on_what_is_in_demand_but_for_who_waits(
    pool: BlockPool,
) -> None:
    store = SnapshotStore(pool)
    publish(store, pool, 1)
    for _ in range(2):
        store.count_hit(prefix(1), 80)
    # six are left, five of them in demand
    live = pool.get_new_blocks(NUM_BLOCKS - 6)
    assert store.publish(prefix(2), live[:2]) == []
    assert len(store.publish(prefix(2), live[:2], is_wanted=True)) == 2


def test_blocks_that_are_not_free_are_kept_for_nobody(pool: BlockPool) -> None:
    store = SnapshotStore(pool)
    copies = publish(store, pool, 1)
    for _ in range(2):
        store.count_hit(prefix(1), 80)
    pool.touch(copies)
    assert store.num_blocks_in_demand(None, NUM_BLOCKS) == 0
    pool.free_blocks(copies)
    assert store.num_blocks_in_demand(None, NUM_BLOCKS) == 5


def test_who_begins_again_is_no_sign_of_others(pool: BlockPool) -> None:
    store = SnapshotStore(pool)
    publish(store, pool, 1)
    for _ in range(3):
        store.count_hit(prefix(1), 80, is_again=True)
    assert store.num_blocks_in_demand(None, NUM_BLOCKS) == 0
    assert store.num_hits == 3
