# SPDX-License-Identifier: Apache-2.0
"""Requests with options of their own on two ranks, which share heads or layers.

A request's row reaches every rank. Where ranks share heads, and where what is kept
depends on no statistics or nothing is evicted, the text is that of one rank. Elsewhere
each stage chooses by its own layers, and the text is that of the request alone on as
many stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.engine.engines import Engine, Prompt, roco_arguments, running_engine
from tests.engine.steps import audited_manager
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.usefixtures("engine_lock"),
]

NUM_NEW = 60
# a second stage of vLLM's has no room for what it receives until a run that warms up,
# which is left out on a CPU where nothing is compiled
PIPELINE: dict[str, Any] = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 1, "backend": "eager"},
}
SERVER = {
    **roco_arguments(SMALL_BUDGET)["additional_config"]["roco"],
    "max_budget": 512,
    "allow_full": True,
}


class Case(NamedTuple):
    """A request.

    Attributes:
        prompt: Its prompt.
        options: Its own options.
        freed: Whether it gives blocks back.
    """

    prompt: Prompt
    options: dict[str, Any]
    freed: bool = True


LONG, OTHER, SHORT = (random_prompt(length, seed=length) for length in (200, 170, 20))

SAME_EVERYWHERE = {
    "full": Case(LONG, {"budget": "full"}, freed=False),
    "short": Case(SHORT, {"budget": 128}, freed=False),
    "recent": Case(LONG, {"policy": "recent", "budget": 64, "recent": 16}),
    "random": Case(OTHER, {"policy": "random", "seed": 3}),
    "random-prompt": Case(LONG, {"policy": "random", "mode": "prompt", "stride": 16}),
    "recent-generation": Case(
        OTHER,
        # evicts when 48 tokens are generated
        {"policy": "recent", "mode": "generation", "budget": 32, "stride": 16}
        | {"recent": 16},
    ),
}
OWN_CHOICE = {
    "default": Case(LONG, {}),
    "64": Case(LONG, {"budget": 64, "stride": 16, "recent": 16}),
    "h2o": Case(OTHER, {"policy": "h2o"}),
    "deviation": Case(OTHER, {"shield": "deviation", "shield_ratio": 0.5, "sink": 48}),
}
CASES = SAME_EVERYWHERE | OWN_CHOICE

Tokens = dict[str, tuple[int, ...]]


def generate(engine: Engine, names: list[str]) -> Tokens:
    """Generate for some requests at once."""
    options = [
        {f"roco_{key}": value for key, value in CASES[name].options.items()}
        for name in names
    ]
    prompts = [CASES[name].prompt for name in names]
    tokens = engine.generate(prompts, NUM_NEW, extra_args=options)
    assert engine.num_lost_blocks == 0
    return dict(zip(names, tokens, strict=True))


def run(
    model: Path, alone_too: dict[str, Case], **parallel: Any
) -> tuple[Tokens, Tokens]:
    """Return what is generated for all at once, and for some of them alone."""
    with running_engine(
        model,
        SMALL_BUDGET,
        additional_config={"roco": SERVER},
        max_num_seqs=len(CASES),
        **parallel,
    ) as engine:
        together = generate(engine, list(CASES))
        alone: Tokens = {}
        for name, case in alone_too.items():
            before = engine.manager.num_freed_blocks
            with audited_manager(engine) as steps:
                alone |= generate(engine, [name])
            assert (engine.manager.num_freed_blocks > before) == case.freed
            # the most of any of them: the longest prompt and the answer
            assert steps.peak_held_blocks <= -(-(200 + NUM_NEW) // 16)
    return together, alone


@pytest.fixture(scope="module")
def one_rank(engine_lock: None, tiny_llama: Path) -> Tokens:
    together, alone = run(tiny_llama, CASES)
    assert together == alone
    return together


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_parallel_size": 2},
        PIPELINE,
    ],
    ids=["tensor", "pipeline"],
)
def test_options_on_two_ranks(
    parallel: dict[str, Any], tiny_llama: Path, one_rank: Tokens
) -> None:
    # the others are known alone from one rank
    together, alone = run(
        tiny_llama, OWN_CHOICE, distributed_executor_backend="mp", **parallel
    )
    assert {name: together[name] for name in OWN_CHOICE} == alone
    # tensor ranks tell each other what their heads say
    same = CASES if "tensor_parallel_size" in parallel else SAME_EVERYWHERE
    for name in same:
        assert together[name] == one_rank[name], name
    # each with options of its own
    assert len({together[name] for name in ("full", "recent", "default", "64")}) == 4
