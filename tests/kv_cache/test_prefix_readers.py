# SPDX-License-Identifier: Apache-2.0
"""Who reads which prefix, when several read the same."""

from __future__ import annotations

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request

from vllm_roco.kv_cache.prefix_readers import PrefixReaders

PLACES = range(8, 32, 8)
PREFIXES = [BlockHash(b"%d" % place) for place in PLACES]


@pytest.fixture
def readers() -> PrefixReaders:
    return PrefixReaders()


def begin(readers: PrefixReaders, name: str, start: int = 0) -> Request:
    """Let a request begin at a length, whose prompt is that of all others."""
    request = Request(
        request_id=name,
        prompt_token_ids=[1] * 32,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
    )
    request.num_computed_tokens = start
    first = start // 8
    readers.begin(request, PLACES[first:], PREFIXES[first:])
    return request


def names(readers: PrefixReaders) -> list[str | None]:
    """Return who is said to read each prefix."""
    found = [*map(readers.reader_of, PREFIXES, PLACES)]
    return [None if request is None else request.request_id for request in found]


def test_another_reader_takes_over_from_one_that_ends(readers: PrefixReaders) -> None:
    """Nobody was known to read the prefix then, and those that waited read it again."""
    for name in "abcd":
        begin(readers, name, 8 * (name == "c"))
    readers.want(PREFIXES[2])
    assert names(readers) == ["a"] * 3
    readers.drop("b")
    assert names(readers) == ["a"] * 3
    readers.drop("a")
    assert names(readers) == ["d", "c", "c"]
    assert readers.is_wanted(PREFIXES[2])
    readers.drop("c")
    assert names(readers) == ["d"] * 3
    readers.drop("d")
    assert names(readers) == [None] * 3
    assert not readers.is_wanted(PREFIXES[2])
    assert not readers


def test_nobody_waits_on_for_a_prefix_that_was_gone_past(
    readers: PrefixReaders,
) -> None:
    """Not for a second reader either: a snapshot is there by then, or there was none
    to be had."""
    first, second = begin(readers, "a"), begin(readers, "b")
    third = begin(readers, "c")
    readers.want(PREFIXES[0])
    first.num_computed_tokens = 8
    assert [*readers.arrivals()] == [(first, 8, PREFIXES[0])]
    assert names(readers) == [None, "a", "a"]
    assert not readers.is_wanted(PREFIXES[0])
    # who has overtaken is not who takes over
    second.num_computed_tokens = 20
    assert [*readers.arrivals()] == []
    readers.drop("a")
    assert names(readers) == [None, "c", "b"]
    third.num_computed_tokens = 24
    assert [*readers.arrivals()] == [(third, 24, PREFIXES[2])]
    second.num_computed_tokens = 24
    assert [*readers.arrivals()] == [(second, 24, PREFIXES[2])]
    assert names(readers) == [None] * 3
    assert not readers


def test_who_goes_past_a_prefix_is_not_waited_for(readers: PrefixReaders) -> None:
    """Those that came waited for a step, and the next reader was taken for none."""
    first = begin(readers, "a")
    readers.want(PREFIXES[1])
    # chosen for a step that ends at 24
    readers.choose("a", 24)
    assert names(readers) == [None, None, "a"]
    second = begin(readers, "b")
    assert names(readers) == ["b", "b", "a"]
    readers.choose("b", 8)
    assert names(readers) == ["b", "b", "a"]
    assert [*readers.arrivals()] == []
    first.num_computed_tokens, second.num_computed_tokens = 24, 8
    assert names(readers) == ["b", "b", "a"]
    assert [*readers.arrivals()] == [(first, 24, PREFIXES[2]), (second, 8, PREFIXES[0])]
    assert names(readers) == [None, "b", None]
    assert readers.is_wanted(PREFIXES[1])


def test_a_step_without_its_reader_ends_nowhere(readers: PrefixReaders) -> None:
    begin(readers, "a")
    readers.choose("a", 24)
    readers.drop("a")
    begin(readers, "a")
    assert names(readers) == ["a"] * 3


def test_the_place_before_each_reader_is_told(readers: PrefixReaders) -> None:
    first, second = begin(readers, "a"), begin(readers, "b", 8)
    assert [*readers.next_places()] == [(8, PREFIXES[0]), (16, PREFIXES[1])]
    first.num_computed_tokens = second.num_computed_tokens = 16
    # they stand there, and others may begin with what they hold
    assert [*readers.next_places()] == [(8, PREFIXES[0]), (16, PREFIXES[1])]
    assert [length for _, length, _ in readers.arrivals()] == [16, 16]
    assert [*readers.next_places()] == [(24, PREFIXES[2])] * 2
    readers.drop("a")
    second.num_computed_tokens = 24
    assert [*readers.arrivals()] == [(second, 24, PREFIXES[2])]
    assert not [*readers.next_places()]
