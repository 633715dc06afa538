# SPDX-License-Identifier: Apache-2.0
"""A request's own options hold in a batch of others, in graphs and asynchronously.

As `tests/engine/test_request_options.py`, with vLLM's runner for GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.steps import audited_manager, poisoned_free_blocks
from tests.engine.test_request_options import (
    NUM_NEW,
    OWN,
    PROMPTS,
    SERVER,
    Tokens,
    generate,
    server_of,
)
from tests.engine.tiny_models import SMALL_BUDGET
from tests.gpu.engines import RUNS, gpu_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

OPTIONS = {"additional_config": {"roco": SERVER}, "max_num_seqs": 20}
KEPT_BY = ("default", "64", "full")
"""What is also asked of servers that have no other options."""


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> dict[str, list[Tokens]]:
    """What engines generate whose requests all have the same options."""
    found: dict[str, list[Tokens]] = {}
    for name in KEPT_BY:
        options, arguments = SMALL_BUDGET, server_of(name)
        if name == "full":
            # not stock vLLM's answer: this model does not stand sums in another order;
            # `test_equals_stock` compares with it
            options, arguments = replace(SMALL_BUDGET, budget=1024), {}
        with gpu_engine(tiny_llama, options, **arguments) as engine:
            found[name] = engine.generate_one_by_one(PROMPTS, NUM_NEW)
    return found


@pytest.mark.parametrize("run", RUNS)
def test_a_crowd_of_options(
    run: str, tiny_llama: Path, alone: dict[str, list[Tokens]]
) -> None:
    work = [(name, prompt) for prompt in PROMPTS for name in OWN]
    with (
        gpu_engine(tiny_llama, SMALL_BUDGET, **OPTIONS, **RUNS[run]) as engine,
        audited_manager(engine),
        poisoned_free_blocks(engine),
    ):
        together = generate(engine, work)
        # the same in slots that others had, each with nobody beside it
        one_by_one = [generate(engine, [each])[0] for each in work[::-1]][::-1]
        assert engine.num_lost_blocks == 0
    assert together == one_by_one
    found = dict(zip(((n, PROMPTS.index(p)) for n, p in work), together, strict=True))
    for number in range(len(PROMPTS)):
        told = [tokens for (_, place), tokens in found.items() if place == number]
        assert len(set(told)) == len(OWN)
    for name, expected in alone.items():
        assert [found[name, number] for number in range(len(PROMPTS))] == expected


def test_preempted_requests_keep_their_options(tiny_llama: Path) -> None:
    names = ["64", "full", "prompt", "128", "random", "h2o"]
    work = [(name, PROMPTS[0]) for name in names]
    scarce = {"num_gpu_blocks_override": 48, "scheduler_reserve_full_isl": False}
    with gpu_engine(tiny_llama, SMALL_BUDGET, **OPTIONS, **scarce) as engine:
        expected = [generate(engine, [each])[0] for each in work]
        assert generate(engine, work) == expected
        assert engine.num_lost_blocks == 0
