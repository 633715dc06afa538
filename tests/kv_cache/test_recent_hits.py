# SPDX-License-Identifier: Apache-2.0
"""Which prefixes count as hit again and again."""

from __future__ import annotations

from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_roco.kv_cache.recent_hits import RecentHits

FIRST, SECOND, THIRD = (BlockHash(name) for name in (b"first", b"second", b"third"))


def test_a_second_hit_counts_as_long_as_both_are_remembered() -> None:
    hits = RecentHits(3)
    hits.add(FIRST)
    hits.add(SECOND)
    assert not hits.repeated
    hits.add(FIRST)
    assert [*hits.repeated] == [FIRST]
    # the first of its hits is forgotten
    hits.add(SECOND)
    assert [*hits.repeated] == [SECOND]
    hits.add(THIRD)
    assert [*hits.repeated] == []


def test_forgotten_prefixes_take_no_memory() -> None:
    hits = RecentHits(2)
    for number in range(100):
        hits.add(BlockHash(bytes([number])))
    assert len(hits._number_of) == 2
