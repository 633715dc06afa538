# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_roco.kv_cache.shared_prefixes import SharedPrefixes


def prefixes(text: str) -> list[BlockHash]:
    """Return what stands for the prefixes of a text, letter by letter."""
    return [BlockHash(text[: end + 1].encode()) for end in range(len(text))]


def places(shared: SharedPrefixes, text: str) -> str:
    """Return the letters of a text behind which others have gone on differently."""
    return "".join(
        letter
        for letter, prefix in zip(text, prefixes(text), strict=True)
        if shared.part_at(prefix)
    )


def test_prompts_part_where_they_go_on_differently() -> None:
    shared = SharedPrefixes()
    shared.enter(prefixes("abcde"))
    assert places(shared, "abcde") == ""
    shared.enter(prefixes("abcde"))
    assert places(shared, "abcde") == ""
    shared.enter(prefixes("abcxy"))
    assert places(shared, "abcde") == places(shared, "abcxy") == "c"
    shared.enter(prefixes("az"))
    assert places(shared, "abcde") == "ac"
    assert places(shared, "az") == "a"


def test_a_prompt_that_ends_does_not_go_on() -> None:
    """Its end is the last place of its own; the longer one serves the others."""
    shared = SharedPrefixes()
    shared.enter(prefixes("abc"))
    shared.enter(prefixes("abcde"))
    shared.enter(prefixes("ab"))
    assert places(shared, "abcde") == ""
    shared.enter(prefixes("abm"))
    assert places(shared, "abcde") == "b"


def test_nothing_parts_at_the_start() -> None:
    shared = SharedPrefixes()
    shared.enter(prefixes("abc"))
    shared.enter(prefixes("xyz"))
    shared.enter([])
    assert places(shared, "abc") == places(shared, "xyz") == ""


def test_only_so_many_are_remembered() -> None:
    shared = SharedPrefixes(max_prefixes=4)
    shared.enter(prefixes("abx"))
    shared.enter(prefixes("aby"))
    assert places(shared, "aby") == "b"
    shared.enter(prefixes("mnop"))
    assert len(shared._next) == 4
    assert places(shared, "aby") == ""
    # of one that is too long the beginning stays, which more prompts share
    shared.enter(prefixes("qrstuv"))
    assert set(shared._next) == set(prefixes("qrst"))
