# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_roco.kv_cache.held_blocks import HeldBlocks


def test_nobody_holds_anything_at_first() -> None:
    held = HeldBlocks()
    assert held.largest == 0
    assert held.of("unknown") == 0


def test_the_largest_falls_back_to_the_runner_up() -> None:
    held = HeldBlocks()
    held.add("a", 5)
    held.add("b", 9)
    held.add("a", 1)
    assert held.largest == 9
    held.add("b", -4)
    assert held.largest == 6
    held.drop("a")
    assert held.largest == 5
    held.drop("b")
    assert held.largest == 0


def test_dropping_an_unknown_request_changes_nothing() -> None:
    held = HeldBlocks()
    held.add("a", 2)
    held.drop("unknown")
    assert (held.largest, held.of("a")) == (2, 2)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-6, 9)), max_size=60))
def test_counts_agree_with_a_plain_dictionary(
    changes: list[tuple[str, int]],
) -> None:
    """A change of 0 drops the request; none goes below nothing."""
    held = HeldBlocks()
    counts: dict[str, int] = {}
    for request_id, change in changes:
        if change == 0:
            held.drop(request_id)
            counts.pop(request_id, None)
        else:
            change = max(change, -counts.get(request_id, 0))
            held.add(request_id, change)
            counts[request_id] = counts.get(request_id, 0) + change
        assert held.largest == max(counts.values(), default=0)
        assert all(held.of(name) == counts.get(name, 0) for name in "abcd")
