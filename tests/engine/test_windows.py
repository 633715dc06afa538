# SPDX-License-Identifier: Apache-2.0
"""Models of which some layers have a sliding window and keep no budget."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engines import Engine, running_engine
from tests.engine.mixed_models import MIXED_MODELS, save_mixed
from tests.engine.steps import audited_manager, most_held_blocks, poisoned_free_blocks
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from vllm_roco.scheduler import describe

pytestmark = pytest.mark.engine

# vLLM's own attention for CPUs wants blocks of a multiple of 32
BUDGET = replace(SMALL_BUDGET, block_size=32, sink=32)
NOBODY_REACHES = replace(BUDGET, budget=1024)
PROMPTS = [
    random_prompt(length, seed=length) for length in (20, 70, 96, 150, 210, 333, 480)
]
NUM_NEW = 150
SMALL_POOL = dict(num_gpu_blocks_override=40, scheduler_reserve_full_isl=False)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixed("exaone4", tmp_path_factory.mktemp("mixed"))


def running(model: Path, **arguments: Any) -> Any:
    return running_engine(model, BUDGET, **{"max_model_len": 640, **arguments})


def num_lost(engine: Engine) -> int:
    pool = engine.scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


@pytest.mark.parametrize("name", MIXED_MODELS)
def test_below_the_budget_the_tokens_are_stock_vllms(tmp_path: Path, name: str) -> None:
    """Nothing but ROCO is named."""
    model = save_mixed(name, tmp_path)
    with running_engine(model, None) as engine:
        expected = [
            (tokens, pytest.approx(logprob, rel=1e-4))
            for tokens, logprob in said_by(engine)
        ]
    with running_engine(model, NOBODY_REACHES) as engine:
        assert said_by(engine) == expected
    with running(model) as engine:
        # tied embeddings repeat themselves, but with another confidence
        assert said_by(engine) != expected
        freed = sum(each.num_freed_blocks for each in engine.scheduler.roco_managers)
        assert freed > 0
        assert num_lost(engine) == 0


def said_by(engine: Engine) -> list[tuple[tuple[int, ...], Any]]:
    """Return tokens and the sum of their log-probabilities."""
    return [
        (tuple(each.token_ids), each.cumulative_logprob)
        for each in engine.complete(PROMPTS, NUM_NEW, logprobs=0)
    ]


@pytest.fixture(scope="module")
def expected(mixed: Path) -> list[tuple[int, ...]]:
    """What synchronous scheduling says while freed blocks keep what they held."""
    with running(mixed) as engine:
        return engine.generate(PROMPTS, NUM_NEW)


@pytest.mark.parametrize("pool", [{}, SMALL_POOL], ids=["large-pool", "small-pool"])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_freed_blocks_are_nobodys(
    mixed: Path,
    expected: list[tuple[int, ...]],
    pool: dict[str, Any],
    steps_in_flight: int,
    request: pytest.FixtureRequest,
) -> None:
    """Neither group reads what the other has freed and a third one writes."""
    if steps_in_flight == 2:
        request.getfixturevalue("asynchronous")
    with running(mixed, **pool) as engine:
        with audited_manager(engine) as steps, poisoned_free_blocks(engine):
            tokens = engine.generate(PROMPTS, NUM_NEW)
        assert tokens == expected
        assert bool(steps.preemptions) == bool(pool), "the pool has the wrong size"
        assert steps.peak_held_blocks <= most_held_blocks(BUDGET, steps_in_flight)
        assert engine.manager.num_freed_blocks > 0
        assert num_lost(engine) == 0


def test_a_request_has_its_own_budget(mixed: Path) -> None:
    """In a crowd as alone, and with all kept as in stock vLLM."""
    own = [{"roco_budget": 64}, {"roco_budget": "full"}, {}, {"roco_mode": "prompt"}]
    server = {
        "additional_config": {
            "roco": {
                **{name: getattr(BUDGET, name) for name in ("budget", "stride")},
                **{name: getattr(BUDGET, name) for name in ("chunk", "sink", "recent")},
                "allow_full": True,
            }
        }
    }
    prompts = PROMPTS[3:]
    with running_engine(mixed, None) as engine:
        stock = engine.generate(prompts, NUM_NEW)
    with running(mixed, **server) as engine:
        crowd = engine.generate(prompts, NUM_NEW, extra_args=own)
        alone = [
            engine.generate([prompt], NUM_NEW, extra_args=[options])[0]
            for prompt, options in zip(prompts, own, strict=True)
        ]
    assert crowd == alone
    assert crowd[1] == stock[1]
    assert crowd[0] != stock[0]


def test_the_start_up_line_tells_what_fits(mixed: Path) -> None:
    """So many sequences run at once in a full cache, and none is preempted."""
    prompts = [random_prompt(400, seed=seed) for seed in range(24)]
    with running(
        mixed,
        num_gpu_blocks_override=61,
        max_num_seqs=24,
        max_num_batched_tokens=128,
    ) as engine:
        line = describe(engine.scheduler)
        found = re.search(r"(\d+) blocks .* (\d+) while .* that (\d+) sequences", line)
        assert found is not None, line
        with audited_manager(engine) as steps:
            engine.generate(prompts, 300)
    # not all are at the most they hold at the same time
    assert max(map(len, steps.scheduled)) - int(found[3]) in (0, 1)
    assert not steps.preemptions
