# SPDX-License-Identifier: Apache-2.0
"""A request that begins behind another's prefix ends as if it had read all of it.

In float32 the tokens and every byte of its live pages are the same. Behind an answer
the tokens are, and the blocks that are kept, and what is in them but for rounding.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.engine.conversations import CUE, END, check_next_turns
from tests.engine.engines import Engine, roco_arguments, running_engine
from tests.engine.final_pages import Ending, run_to_the_end
from tests.engine.prefix_hits import (
    NUM_NEW,
    assert_same,
    assert_whole,
    check_crowd,
    check_one_by_one,
    without_hits,
)
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from tests.oracle import Options
from vllm_roco.scheduler import RocoAsyncScheduler

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=["roco", "recent"])
def options(request: pytest.FixtureRequest) -> Options:
    return replace(SMALL_BUDGET, policy=request.param)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, options: Options) -> dict[str, Ending]:
    return without_hits(tiny_llama, options)


def test_one_by_one(
    tiny_llama: Path, options: Options, expected: dict[str, Ending]
) -> None:
    with running_engine(tiny_llama, options, enable_prefix_caching=True) as engine:
        check_one_by_one(engine, expected)


@pytest.mark.parametrize("pool", [512, 46], ids=["large-pool", "small-pool"])
def test_all_at_once(
    tiny_llama: Path, options: Options, expected: dict[str, Ending], pool: int
) -> None:
    check_crowd(tiny_llama, options, expected, pool)


@pytest.mark.parametrize("pool", [512, 46], ids=["large-pool", "small-pool"])
def test_all_at_once_asynchronously(
    tiny_llama: Path,
    options: Options,
    expected: dict[str, Ending],
    pool: int,
    asynchronous: None,
) -> None:
    check_crowd(tiny_llama, options, expected, pool, RocoAsyncScheduler)


def turns(num_turns: int) -> list[tuple[int, ...]]:
    """Return the prompts of a conversation, each longer by an answer and a question."""
    text: tuple[int, ...] = ()
    prompts = []
    for turn in range(num_turns):
        said = [token for token in random_prompt(90, seed=turn) if token != END][:80]
        text += (*said[:60], END, *CUE)
        prompts.append(text)
        text += (*said[60:],)
    return prompts


def test_next_turns_begin_within_a_chunk(tiny_llama: Path) -> None:
    """At the last question's end, where they end as if they had read all of it."""
    conversation = turns(7)
    chosen = roco_arguments(SMALL_BUDGET)["additional_config"]["roco"]
    arguments = {"additional_config": {"roco": {**chosen, "turn_end_token_ids": [END]}}}

    def endings(engine: Engine) -> list[Ending]:
        found = [run_to_the_end(engine, [turn], NUM_NEW)[0] for turn in conversation]
        assert_whole(engine)
        return found

    with running_engine(tiny_llama, SMALL_BUDGET, **arguments) as engine:
        expected = endings(engine)
    with running_engine(
        tiny_llama, SMALL_BUDGET, enable_prefix_caching=True, **arguments
    ) as engine:
        found = endings(engine)
    for ending, other in zip(found, expected, strict=True):
        assert_same(ending, other)
    size = SMALL_BUDGET.block_size
    ends = [(len(turn) - len(CUE)) // size * size for turn in conversation]
    # the first one evicts nothing while it is read, and leaves no snapshot
    assert [ending.num_cached_tokens for ending in found] == [0, 0, *ends[1:-1]]
    assert any(end % SMALL_BUDGET.chunk for end in ends[1:-1])


def test_next_turns_begin_behind_answers(tiny_llama: Path, asynchronous: None) -> None:
    check_next_turns(partial(running_engine, tiny_llama, SMALL_BUDGET))
