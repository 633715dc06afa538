# SPDX-License-Identifier: Apache-2.0
"""Two GPUs, which share a model's heads or its layers.

The engines with ranks come first: their workers are forked as long as this process has
not used a GPU itself, and else import all of vLLM again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.engine.engines import Engine, roco_arguments
from tests.engine.kept_positions import Positions, recorded_positions
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from tests.gpu.engines import gpu_engine
from tests.gpu.test_equals_stock import NEVER, Answer, Disagreement, answers_of
from tests.oracle import Options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
    pytest.mark.skipif(
        torch.cuda.device_count() < 2,
        reason=f"needs two NVIDIA GPUs, found {torch.cuda.device_count()}",
    ),
]

NUM_NEW = 120
TENSOR: dict[str, Any] = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
PIPELINE: dict[str, Any] = dict(
    pipeline_parallel_size=2, distributed_executor_backend="mp"
)
ALIKE = {
    # whatever heads and layers a rank has
    "recent": {"policy": "recent", "budget": 64, "recent": 16},
    "random": {"policy": "random", "seed": 3},
}
BY_SCORES = {
    "contribution": {"shield": "contribution", "shield_ratio": 1.0},
    "peak": {"shield": "peak", "shield_ratio": 0.7},
    "deviation": {"shield": "deviation", "shield_ratio": 0.5},
    "h2o": {"policy": "h2o"},
}
EVICTING = {**ALIKE, **BY_SCORES}
PROMPTS = {
    name: random_prompt(length, seed=length)
    for name, length in zip(EVICTING, (300, 230, 170, 150, 129, 70), strict=True)
}


class Ran(NamedTuple):
    """What an engine did.

    Attributes:
        tokens: Generated, by name of `EVICTING`.
        kept: Positions that each rank kept, likewise.
        unbounded: Generated for all prompts without a budget.
    """

    tokens: dict[str, tuple[int, ...]]
    kept: dict[str, list[Positions]]
    unbounded: list[tuple[int, ...]]


def run(model: Path, **parallel: Any) -> Ran:
    server = roco_arguments(SMALL_BUDGET)["additional_config"]["roco"]
    with gpu_engine(
        model,
        SMALL_BUDGET,
        additional_config={"roco": {**server, "allow_full": True}},
        # a step more would go on in pages that are looked at
        async_scheduling=False,
        **parallel,
    ) as engine:
        with recorded_positions(engine) as recorded:
            tokens = generate(engine, list(EVICTING.values()))
        unbounded = generate(engine, [{"budget": "full"}] * len(PROMPTS))
        assert engine.num_lost_blocks == 0
    return Ran(
        dict(zip(EVICTING, tokens, strict=True)),
        {name: recorded[tuple(prompt)] for name, prompt in PROMPTS.items()},
        unbounded,
    )


def generate(engine: Engine, options: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    named = [{f"roco_{key}": value for key, value in x.items()} for x in options]
    return engine.generate(list(PROMPTS.values()), NUM_NEW, extra_args=named)


@pytest.fixture(scope="module")
def ran(engine_lock: None, tiny_llama: Path) -> dict[str, Ran]:
    """What two tensor ranks, two stages and one GPU do, in this order."""
    return {
        "tensor": run(tiny_llama, **TENSOR),
        "pipeline": run(tiny_llama, **PIPELINE),
        "one": run(tiny_llama),
    }


def test_tensor_ranks_keep_what_one_gpu_does(ran: dict[str, Ran]) -> None:
    """Also inside graphs, which hold what the ranks tell each other."""
    one, tensor = ran["one"], ran["tensor"]
    assert tensor.kept == {name: kept * 2 for name, kept in one.kept.items()}
    assert tensor.tokens == one.tokens
    # each with options of its own
    assert len(set(one.tokens.values())) == len(EVICTING)


def test_stages_choose_by_their_own_layers(ran: dict[str, Ran]) -> None:
    """They are one GPU where what is kept depends on no scores."""
    one, pipeline = ran["one"], ran["pipeline"]
    for name in ALIKE:
        assert pipeline.kept[name] == one.kept[name] * 2, name
        assert pipeline.tokens[name] == one.tokens[name], name
    for name in BY_SCORES:
        assert {len(kept) for kept in pipeline.kept[name]} == {
            len(one.kept[name][0])
        }, name


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_budgets_that_nobody_reaches(parallel: str, ran: dict[str, Ran]) -> None:
    assert ran[parallel].unbounded == ran["one"].unbounded


def test_tensor_ranks_differ_from_stock_as_stock_does(tiny_llama: Path) -> None:
    """In bfloat16, no more than FLASH_ATTN on two GPUs from FLASH_ATTN on one."""

    def answers(options: Options | None, **arguments: Any) -> list[Answer]:
        prompts = [random_prompt(n, seed=n) for n in range(50, 850, 50)]
        with gpu_engine(
            tiny_llama,
            options,
            dtype="bfloat16",
            max_num_seqs=16,
            max_num_batched_tokens=1024,
            **arguments,
        ) as engine:
            return answers_of(engine, prompts, 96)

    stock = {"attention_backend": "FLASH_ATTN"}
    ours = answers(NEVER, **TENSOR)
    flash = answers(None, **stock, **TENSOR)
    between_stock = Disagreement.between(answers(None, **stock), flash)
    against_flash = Disagreement.between(ours, flash)
    assert against_flash.parted <= 2 * between_stock.parted + 1
    assert against_flash.widest_gap <= 2 * between_stock.widest_gap + 0.05
