# SPDX-License-Identifier: Apache-2.0
"""A request that begins behind another's prefix ends as if it had read all of it.

In float32 the tokens and every byte of its live pages are the same.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engines import Engine, running_engine
from tests.engine.final_pages import Ending, run_to_the_end
from tests.engine.steps import audited_manager, poisoned_free_blocks
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from tests.oracle import Options
from vllm_roco.kv_cache.integrity import check_integrity
from vllm_roco.scheduler import RocoAsyncScheduler

pytestmark = pytest.mark.engine

SHARED = random_prompt(330, seed=1)
DONOR = SHARED + random_prompt(70, seed=2)
PROMPTS = {
    "donor": DONOR,
    "same": DONOR,
    "sibling": SHARED + random_prompt(40, seed=3),
    "second sibling": SHARED + random_prompt(75, seed=4),
    "extension": SHARED + random_prompt(197, seed=5),
    "next turn": DONOR + random_prompt(150, seed=6),
    "another": random_prompt(330, seed=7),
}
NUM_NEW = 100
LAST = 384
"""The last place of the donor's prompt where it can be cut, in chunks of 64."""
JUNCTION = 320
"""The last such place before the siblings part from it."""


def alone(engine: Engine) -> dict[str, Ending]:
    """Return how each prompt ends, each sent alone, in order."""
    return {
        name: run_to_the_end(engine, [prompt], NUM_NEW)[0]
        for name, prompt in PROMPTS.items()
    }


@pytest.fixture(scope="module", params=["roco", "recent"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, policy: str) -> dict[str, Ending]:
    """How each prompt ends without any hit."""
    options = replace(SMALL_BUDGET, policy=policy)
    with running_engine(tiny_llama, options) as engine:
        endings = alone(engine)
    assert {ending.num_cached_tokens for ending in endings.values()} == {0}
    return endings


def assert_same(found: Ending, expected: Ending) -> None:
    assert found.tokens == expected.tokens
    # who reads its own output again does so in chunks, which round differently
    assert found.was_preempted or found.pages == expected.pages


class TestHits:
    def test_one_by_one(
        self, tiny_llama: Path, policy: str, expected: dict[str, Ending]
    ) -> None:
        options = replace(SMALL_BUDGET, policy=policy)
        with (
            running_engine(tiny_llama, options, enable_prefix_caching=True) as engine,
            audited_manager(engine),
            poisoned_free_blocks(engine),
        ):
            found = alone(engine)
            assert_whole(engine)
            begun = {name: found[name].num_cached_tokens for name in PROMPTS}
            assert engine.llm.reset_prefix_cache()
            again = run_to_the_end(engine, [DONOR], NUM_NEW)[0]
        for name in PROMPTS:
            assert_same(found[name], expected[name])
        assert begun == {
            "donor": 0,
            "same": LAST,
            # the first that parts from the donor makes the place known
            "sibling": 0,
            "second sibling": JUNCTION,
            "extension": JUNCTION,
            "next turn": LAST,
            "another": 0,
        }
        assert again.num_cached_tokens == 0
        assert_same(again, expected["donor"])

    @pytest.mark.parametrize("pool", [512, 46], ids=["large-pool", "small-pool"])
    def test_all_at_once(
        self, tiny_llama: Path, policy: str, expected: dict[str, Ending], pool: int
    ) -> None:
        check_crowd(tiny_llama, replace(SMALL_BUDGET, policy=policy), expected, pool)

    @pytest.mark.parametrize("pool", [512, 46], ids=["large-pool", "small-pool"])
    def test_all_at_once_asynchronously(
        self,
        tiny_llama: Path,
        policy: str,
        expected: dict[str, Ending],
        pool: int,
        asynchronous: None,
    ) -> None:
        options = replace(SMALL_BUDGET, policy=policy)
        check_crowd(tiny_llama, options, expected, pool, RocoAsyncScheduler)


def check_crowd(
    model: Path,
    options: Options,
    expected: dict[str, Ending],
    pool: int,
    scheduler: type | None = None,
    poison_value: float = math.nan,
) -> None:
    """Twice, so that the second crowd begins while snapshots of the first live."""
    small: dict[str, Any] = dict(
        num_gpu_blocks_override=pool, scheduler_reserve_full_isl=pool > 100
    )
    with (
        running_engine(model, options, enable_prefix_caching=True, **small) as engine,
        audited_manager(engine) as steps,
        poisoned_free_blocks(engine, poison_value),
    ):
        assert scheduler is None or isinstance(engine.scheduler, scheduler)
        for _ in range(2):
            crowd = run_to_the_end(engine, list(PROMPTS.values()), NUM_NEW)
            for ending, name in zip(crowd, PROMPTS, strict=True):
                assert_same(ending, expected[name])
        assert_whole(engine)
        cache = engine.manager.prefix_cache
        assert cache is not None
        assert cache.store.num_hits >= 3
        assert bool(steps.preemptions) == (pool < 100), "the pool has the wrong size"


def assert_whole(engine: Engine) -> None:
    check_integrity(engine.manager)
    assert engine.num_lost_blocks == 0
