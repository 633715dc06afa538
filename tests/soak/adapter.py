# SPDX-License-Identifier: Apache-2.0
"""A random LoRA adapter of any model, as PEFT writes one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 4
PROJECTIONS = ("q_proj", "v_proj", "o_proj")


def save_adapter(model: Path, folder: Path) -> None:
    """Write an adapter that changes what is said.

    Args:
        model: A Hugging Face folder with its weights in one file.
        folder: Where to; it is made.
    """
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    with safe_open(model / "model.safetensors", "pt") as weights:
        for key in weights.keys():  # noqa: SIM118 -- not a mapping
            name = key.removesuffix(".weight")
            if not name.endswith(PROJECTIONS):
                continue
            rows, columns = weights.get_slice(key).get_shape()
            down = torch.randn(RANK, columns, generator=generator)
            up = 0.1 * torch.randn(rows, RANK, generator=generator)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [*PROJECTIONS],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
