# SPDX-License-Identifier: Apache-2.0
"""Prompts that begin like others, and checks that hits of prefixes change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.engine.engines import Engine, running_engine
from tests.engine.final_pages import Ending, run_to_the_end
from tests.engine.steps import audited_manager, poisoned_free_blocks
from tests.engine.tiny_models import random_prompt
from tests.oracle import Options
from vllm_roco.kv_cache.integrity import check_integrity

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
BEGUN = {
    "donor": 0,
    "same": LAST,
    # the first that parts from the donor makes the place known
    "sibling": 0,
    "second sibling": JUNCTION,
    "extension": JUNCTION,
    "next turn": LAST,
    "another": 0,
}
"""With how many tokens each prompt begins, sent one after the other."""


def alone(engine: Engine) -> dict[str, Ending]:
    """Return how each prompt ends, each sent alone, in order."""
    return {
        name: run_to_the_end(engine, [prompt], NUM_NEW)[0]
        for name, prompt in PROMPTS.items()
    }


def without_hits(model: Path, options: Options) -> dict[str, Ending]:
    """Return how each prompt ends that is read whole."""
    with running_engine(model, options) as engine:
        endings = alone(engine)
    assert {ending.num_cached_tokens for ending in endings.values()} == {0}
    return endings


def assert_same(found: Ending, expected: Ending) -> None:
    """Fail unless a request ended as another, with tokens and bytes of pages."""
    assert found.tokens == expected.tokens
    # who reads its own output again does so in chunks, which round differently
    assert found.was_preempted or found.pages == expected.pages


def assert_whole(engine: Engine) -> None:
    """Fail if the block manager's books do not agree, or blocks were not given back."""
    check_integrity(engine.manager)
    assert engine.num_lost_blocks == 0


def check_one_by_one(engine: Engine, expected: dict[str, Ending]) -> None:
    """Send each prompt alone to an engine whose prefix cache is empty."""
    with audited_manager(engine), poisoned_free_blocks(engine):
        found = alone(engine)
        assert_whole(engine)
        assert engine.llm.reset_prefix_cache()
        again = run_to_the_end(engine, [DONOR], NUM_NEW)[0]
    for name in PROMPTS:
        assert_same(found[name], expected[name])
    assert {name: found[name].num_cached_tokens for name in PROMPTS} == BEGUN
    assert again.num_cached_tokens == 0
    assert_same(again, expected["donor"])


def check_crowd(
    model: Path,
    options: Options,
    expected: dict[str, Ending],
    pool: int,
    scheduler: type | None = None,
) -> None:
    """Twice, so that the second crowd begins while snapshots of the first live."""
    small: dict[str, Any] = dict(
        num_gpu_blocks_override=pool, scheduler_reserve_full_isl=pool > 100
    )
    with (
        running_engine(model, options, enable_prefix_caching=True, **small) as engine,
        audited_manager(engine) as steps,
        poisoned_free_blocks(engine),
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
