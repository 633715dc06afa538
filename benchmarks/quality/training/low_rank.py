# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, arXiv 2106.09685) that are added to the weights themselves.

A step sees the sum of weight and adapter, rounded to the weight's dtype, which is what
a merged model has: nothing changes by merging. It costs one sum a step, where adapters
beside their layers cost two more products for every token. Files are in PEFT's format.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

ALPHA = 32
TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
"""Every linear layer of a Llama but for the head."""
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."


class LowRank(nn.Module):
    """What is added to one weight.

    Attributes:
        a: `[rank, inputs]` float32.
        b: `[outputs, rank]` float32, zeros at first.
        scale: Factor on their product.
    """

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        """Start with nothing added.

        Args:
            weight: `[outputs, inputs]`.
            rank: Of what is added.
        """
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.empty(rank, inputs, device=weight.device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale = ALPHA / rank

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the sum, in the weight's dtype."""
        return (weight.float() + self.scale * (self.b @ self.a)).to(weight.dtype)


def attach(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Add an adapter to every target of a model, which is frozen but for them.

    Args:
        model: Hugging Face decoder.
        rank: Of each adapter.

    Returns:
        What is to be trained.
    """
    model.requires_grad_(False)
    for _, layer in _targets(model):
        weight: Any = layer.weight
        parametrize.register_parametrization(
            layer, "weight", LowRank(weight, rank), unsafe=True
        )
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def restore(model: nn.Module, folder: Path) -> None:
    """Give a model's adapters the values of a folder's.

    Args:
        model: What `attach` changed.
        folder: Of adapters of the same rank.

    Raises:
        ValueError: The adapters are not those of this model, or of another rank.
    """
    tensors = load_file(folder / WEIGHTS)
    for name, layer in _targets(model):
        added = _added(layer)
        for letter, parameter in (("A", added.a), ("B", added.b)):
            stored = tensors.get(f"{_PREFIX}{name}.lora_{letter}.weight")
            shape = None if stored is None else tuple(stored.shape)
            if stored is None or shape != tuple(parameter.shape):
                raise ValueError(
                    f"{folder / WEIGHTS} has {shape or 'nothing'} for {name}, not "
                    f"{tuple(parameter.shape)}. Give an adapter of this model and rank."
                )
            parameter.data.copy_(stored)


def save(model: nn.Module, folder: Path, base: str) -> None:
    """Write a model's adapters in bfloat16, in PEFT's format.

    Args:
        model: What `attach` changed.
        folder: Made if it is not there.
        base: Name of the model that they belong to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, rank = {}, 0
    for name, layer in _targets(model):
        added = _added(layer)
        rank = added.a.shape[0]
        for letter, value in (("A", added.a), ("B", added.b)):
            key = f"{_PREFIX}{name}.lora_{letter}.weight"
            tensors[key] = value.detach().to(torch.bfloat16).cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def merge(model: nn.Module, folder: Path) -> None:
    """Add a folder's adapters to a model's weights for good.

    Raises:
        ValueError: The adapters are not those of this model.
    """
    config = json.loads((folder / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / WEIGHTS)
    targets = dict(_targets(model))
    names = {key.removeprefix(_PREFIX).partition(".lora_")[0] for key in tensors}
    if names != targets.keys():
        odd = min(names ^ targets.keys())
        base = config["base_model_name_or_path"]
        raise ValueError(
            f"{folder / WEIGHTS} has other layers than the model, such as {odd}. "
            f"Give the model that it was trained for, {base}."
        )
    for name, layer in targets.items():
        a, b = (
            tensors[f"{_PREFIX}{name}.lora_{letter}.weight"].float() for letter in "AB"
        )
        weight: Any = layer.weight
        total = weight.data.float() + scale * (b @ a).to(weight.device)
        weight.data = total.to(weight.dtype)


def _targets(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS
    ]


def _added(layer: nn.Module) -> LowRank:
    parametrizations: Any = layer.parametrizations
    added = parametrizations.weight[0]
    assert isinstance(added, LowRank)
    return added
