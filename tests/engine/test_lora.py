# SPDX-License-Identifier: Apache-2.0
"""An adapter serves as a model of its own would, beside the one it belongs to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from vllm.lora.request import LoRARequest

from tests.engine.agreement import assert_agreement
from tests.engine.engines import running_engine
from tests.engine.kept_blocks import recorded_kept_blocks
from tests.engine.tiny_models import (
    SMALL_BUDGET,
    TINY_BUDGET,
    load_for_oracle,
    random_prompt,
)
from tests.oracle import generate

pytestmark = pytest.mark.engine

RANK = 4
PROJECTIONS = ("q_proj", "v_proj", "o_proj")
LORA: dict[str, Any] = dict(enable_lora=True, max_loras=2, max_lora_rank=8)
# 110 tokens in the end, and the first eviction comes at 128
SHORT = [random_prompt(length, seed=length) for length in (80, 33)]
NUM_NEW_SHORT = 30
LONG = [random_prompt(length, seed=length) for length in (240, 90)]
NUM_NEW_LONG = 60


@dataclass(frozen=True)
class Adapter:
    """A made-up adapter.

    Attributes:
        request: What brings it.
        merged: The model that has it in its weights.
    """

    request: LoRARequest
    merged: PreTrainedModel


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = tmp_path_factory.mktemp("adapter")
    model = load_for_oracle(tiny_llama)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS):
            assert isinstance(module, torch.nn.Linear)
            down = torch.randn(RANK, module.in_features, generator=generator)
            up = 0.1 * torch.randn(module.out_features, RANK, generator=generator)
            module.weight.data += up @ down
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(PROJECTIONS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return Adapter(LoRARequest("adapter", 1, str(folder)), model)


def test_not_evicting_equals_stock(tiny_llama: Path, adapter: Adapter) -> None:
    arguments = (SHORT, NUM_NEW_SHORT)
    with running_engine(tiny_llama, None, **LORA) as engine:
        base = engine.generate_one_by_one(*arguments)
        adapted = engine.generate_one_by_one(*arguments, adapter=adapter.request)
    assert all(own != other for own, other in zip(base, adapted, strict=True))

    with running_engine(tiny_llama, SMALL_BUDGET, **LORA) as engine:
        assert engine.generate_one_by_one(*arguments) == base
        found = engine.generate_one_by_one(*arguments, adapter=adapter.request)
        # both in the same steps
        together = engine.run(
            [*SHORT, *SHORT],
            NUM_NEW_SHORT,
            adapter=[*[None] * len(SHORT), *[adapter.request] * len(SHORT)],
        )
        assert engine.manager.num_freed_blocks == 0
    assert found == adapted
    tokens = [tuple(output.outputs[0].token_ids) for output in together]
    assert tokens == [*base, *adapted]


def test_evicting_equals_the_oracle(tiny_llama: Path, adapter: Adapter) -> None:
    oracle = [
        generate(adapter.merged, prompt, TINY_BUDGET, NUM_NEW_LONG) for prompt in LONG
    ]
    with (
        running_engine(tiny_llama, TINY_BUDGET, **LORA) as engine,
        recorded_kept_blocks(engine) as kept,
    ):
        tokens = engine.generate(LONG, NUM_NEW_LONG, adapter=adapter.request)
        assert engine.manager.num_freed_blocks > 0
        assert engine.num_lost_blocks == 0
    assert_agreement(LONG, tokens, kept, oracle)


def test_no_hit_crosses_adapters(tiny_llama: Path, adapter: Adapter) -> None:
    prompts = [*LONG, *SHORT]
    arguments = {**LORA, "enable_prefix_caching": True}
    with running_engine(tiny_llama, SMALL_BUDGET, **arguments) as engine:
        for request in (None, adapter.request):
            first = engine.run(prompts, 8, adapter=request)
            assert not any(output.num_cached_tokens for output in first)
        for request in (None, adapter.request):
            again = engine.run(prompts, 8, adapter=request)
            # the first prompt evicts, the others are found up to their last block
            cached = [output.num_cached_tokens for output in again]
            assert cached == [192, 80, 64, 32]
        assert engine.num_lost_blocks == 0
