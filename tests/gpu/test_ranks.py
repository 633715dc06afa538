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


def answers(model: Path, options: Options | None, **arguments: Any) -> list[Answer]:
    """Return what bfloat16 engines say without an eviction."""
    prompts = [random_prompt(length, seed=length) for length in range(50, 850, 50)]
    with gpu_engine(
        model,
        options,
        dtype="bfloat16",
        max_num_seqs=16,
        max_num_batched_tokens=1024,
        **arguments,
    ) as engine:
        return answers_of(engine, prompts, 96)


class TwoGpus(NamedTuple):
    """What engines with ranks do.

    Attributes:
        tensor: Those that share heads.
        pipeline: Those that share layers.
        ours: Without an eviction, ranks that share heads.
        flash: The same of FLASH_ATTN.
    """

    tensor: Ran
    pipeline: Ran
    ours: list[Answer]
    flash: list[Answer]


@pytest.fixture(scope="module")
def two_gpus(engine_lock: None, tiny_llama: Path) -> TwoGpus:
    """All engines with ranks, one after another."""
    return TwoGpus(
        run(tiny_llama, **TENSOR),
        run(tiny_llama, **PIPELINE),
        answers(tiny_llama, NEVER, **TENSOR),
        answers(tiny_llama, None, attention_backend="FLASH_ATTN", **TENSOR),
    )


@pytest.fixture(scope="module")
def one(two_gpus: TwoGpus, tiny_llama: Path) -> Ran:
    """What one GPU does, which this process uses from here on."""
    return run(tiny_llama)


def test_tensor_ranks_keep_what_one_gpu_does(two_gpus: TwoGpus, one: Ran) -> None:
    """Also inside graphs, which hold what the ranks tell each other."""
    tensor = two_gpus.tensor
    assert tensor.kept == {name: kept * 2 for name, kept in one.kept.items()}
    assert tensor.tokens == one.tokens
    # each with options of its own
    assert len(set(one.tokens.values())) == len(EVICTING)


def test_stages_choose_by_their_own_layers(two_gpus: TwoGpus, one: Ran) -> None:
    """They are one GPU where what is kept depends on no scores."""
    pipeline = two_gpus.pipeline
    for name in ALIKE:
        assert pipeline.kept[name] == one.kept[name] * 2, name
        assert pipeline.tokens[name] == one.tokens[name], name
    for name in BY_SCORES:
        lengths = {len(kept) for kept in pipeline.kept[name]}
        assert lengths == {len(one.kept[name][0])}, name


def test_budgets_that_nobody_reaches(two_gpus: TwoGpus, one: Ran) -> None:
    assert two_gpus.tensor.unbounded == one.unbounded
    assert two_gpus.pipeline.unbounded == one.unbounded


def test_tensor_ranks_differ_from_stock_as_stock_does(
    two_gpus: TwoGpus, one: Ran, tiny_llama: Path
) -> None:
    """In bfloat16, no more than FLASH_ATTN on two GPUs from FLASH_ATTN on one."""
    of_one = answers(tiny_llama, None, attention_backend="FLASH_ATTN")
    between_stock = Disagreement.between(of_one, two_gpus.flash)
    against_flash = Disagreement.between(two_gpus.ours, two_gpus.flash)
    assert against_flash.parted <= 2 * between_stock.parted + 1
    assert against_flash.widest_gap <= 2 * between_stock.widest_gap + 0.05
