# SPDX-License-Identifier: Apache-2.0
"""A request with options of its own gets what a server of these options would say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.engines import Engine, Prompt, roco_arguments, running_engine
from tests.engine.steps import recorded_steps
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt

pytestmark = pytest.mark.engine

NUM_NEW = 150
PROMPTS = [random_prompt(length, seed=length) for length in (200, 170)]

SERVER = {
    **roco_arguments(SMALL_BUDGET)["additional_config"]["roco"],
    "max_budget": 512,
    "allow_full": True,
}
OWN: dict[str, dict[str, Any]] = {
    "default": {},
    "64": {"budget": 64, "stride": 16, "recent": 16},
    "128": {"budget": 128},
    "256": {"budget": 256},
    "full": {"budget": "full"},
    "prompt": {"mode": "prompt", "budget": 64},
    "generation": {"mode": "generation", "budget": 64},
    "h2o": {"policy": "h2o"},
    "random": {"policy": "random", "seed": 3},
    "deviation": {"shield": "deviation", "shield_ratio": 0.5, "sink": 48},
}

Tokens = tuple[int, ...]


def generate(
    engine: Engine, work: list[tuple[str, Prompt]], **arguments: Any
) -> list[Tokens]:
    """Generate for prompts at once, each with the options of that name."""
    return engine.generate(
        [prompt for _, prompt in work],
        NUM_NEW,
        extra_args=[
            {f"roco_{key}": value for key, value in OWN[name].items()}
            for name, _ in work
        ],
        **arguments,
    )


def server_of(name: str) -> dict[str, Any]:
    """Return the configuration of a server for which the options are the default."""
    own = {key: value for key, value in OWN[name].items() if key != "seed"}
    return {"additional_config": {"roco": {**SERVER, **own}}}


@pytest.fixture(scope="module")
def together(tiny_llama: Path) -> dict[str, list[Tokens]]:
    """What is generated in mixed batches, by options, for each prompt."""
    with running_engine(
        tiny_llama, SMALL_BUDGET, additional_config={"roco": SERVER}, max_num_seqs=20
    ) as engine:
        work = [(name, prompt) for prompt in PROMPTS for name in OWN]
        tokens = generate(engine, work)
        assert engine.num_lost_blocks == 0
        # slots and rows of requests that ended serve others
        again = generate(engine, work[:3][::-1])
        plain = engine.generate(PROMPTS, NUM_NEW)
    assert again == tokens[:3][::-1]
    found: dict[str, list[Tokens]] = {name: [] for name in OWN}
    for (name, _), generated in zip(work, tokens, strict=True):
        found[name].append(generated)
    assert plain == found["default"]
    return found


def test_options_make_a_difference(together: dict[str, list[Tokens]]) -> None:
    for number in range(len(PROMPTS)):
        told = {name: tokens[number] for name, tokens in together.items()}
        assert len(set(told.values())) == len(OWN), told


@pytest.mark.parametrize("name", ["64", "128", "256", "prompt", "generation", "h2o"])
def test_own_options_are_those_of_a_server(
    name: str, tiny_llama: Path, together: dict[str, list[Tokens]]
) -> None:
    with running_engine(tiny_llama, SMALL_BUDGET, **server_of(name)) as engine:
        assert engine.generate_one_by_one(PROMPTS, NUM_NEW) == together[name]


def test_full_is_a_server_without_a_budget(
    tiny_llama: Path, together: dict[str, list[Tokens]]
) -> None:
    with running_engine(tiny_llama, None) as engine:
        assert engine.generate_one_by_one(PROMPTS, NUM_NEW) == together["full"]


def test_options_outlive_a_preemption(
    tiny_llama: Path, together: dict[str, list[Tokens]]
) -> None:
    names = ["64", "full", "prompt", "128", "random", "h2o"]
    with (
        running_engine(
            tiny_llama,
            SMALL_BUDGET,
            additional_config={"roco": SERVER},
            num_gpu_blocks_override=48,
            scheduler_reserve_full_isl=False,
        ) as engine,
        recorded_steps(engine) as steps,
    ):
        tokens = generate(engine, [(name, PROMPTS[0]) for name in names])
        assert engine.num_lost_blocks == 0
    assert len(steps.preemptions) > 1
    assert tokens == [together[name][0] for name in names]
