# SPDX-License-Identifier: Apache-2.0
"""What a request keeps and says does not depend on who else is served."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.engines import running_engine
from tests.engine.kept_blocks import recorded_kept_blocks
from tests.engine.steps import recorded_steps
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt

pytestmark = pytest.mark.engine

PROMPTS = [
    random_prompt(length, seed=length) for length in (333, 210, 150, 96, 70, 45, 20)
]
NUM_NEW = 150
# room for one chunk of 64 beside seven decodes, so the others' chunks must wait
TIGHT = dict(max_num_batched_tokens=100)


def test_alone_among_others_and_after_a_preemption(tiny_llama: Path) -> None:
    """Seven requests at once need more blocks than the pool of the last runs has."""
    with running_engine(tiny_llama, SMALL_BUDGET, **TIGHT) as engine:
        with recorded_kept_blocks(engine) as kept_alone:
            alone = engine.generate_one_by_one(PROMPTS, NUM_NEW)
        # freed when the last token but one was scheduled; the last is never computed
        assert engine.manager.num_freed_blocks == sum(
            SMALL_BUDGET.evicted_blocks(len(prompt) + NUM_NEW - 2) for prompt in PROMPTS
        )
        with recorded_kept_blocks(engine) as kept_together:
            together = engine.generate(PROMPTS, NUM_NEW)
        assert engine.num_lost_blocks == 0
    assert all(len(evictions) > 1 for evictions in kept_alone.values())
    assert len(kept_alone) == len(PROMPTS)
    assert kept_together == kept_alone
    assert together == alone

    # the newest request is preempted, or the one that matters least: a long one
    for policy, prompts, priorities in (
        ("fcfs", PROMPTS[::-1], None),
        ("priority", PROMPTS, [len(prompt) for prompt in PROMPTS]),
    ):
        with (
            running_engine(
                tiny_llama,
                SMALL_BUDGET,
                **TIGHT,
                num_gpu_blocks_override=38,
                scheduler_reserve_full_isl=False,
                scheduling_policy=policy,
            ) as engine,
            recorded_steps(engine) as steps,
            recorded_kept_blocks(engine) as kept_preempted,
        ):
            tokens = engine.generate(prompts, NUM_NEW, priorities=priorities)
            assert engine.num_lost_blocks == 0
        # what was generated one by one comes again in chunks, and evicts again
        assert any(
            SMALL_BUDGET.evicted_blocks(preemption.num_computed_tokens)
            - SMALL_BUDGET.evicted_blocks(preemption.num_prompt_tokens)
            > SMALL_BUDGET.stride_blocks
            for preemption in steps.preemptions
        ), "no request was preempted late enough to tell"
        assert kept_preempted == kept_alone
        assert dict(zip(prompts, tokens, strict=True)) == dict(
            zip(PROMPTS, alone, strict=True)
        )
