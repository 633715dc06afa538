# SPDX-License-Identifier: Apache-2.0
"""The adapter that lies here fits its model, and is merged once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quality.training.trained import ADAPTERS, find_any
from tools.packaged_models import PACKAGED_MODELS, SMOLLM2

LAYER = "model.layers.7.mlp.down_proj"


@pytest.mark.parametrize("name", [n for n in ADAPTERS if ADAPTERS[n].exists()])
def test_the_trained_model_is_merged_once(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    adapter = ADAPTERS[name]
    monkeypatch.setenv(PACKAGED_MODELS[SMOLLM2].variable, str(smollm2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    folder = Path(find_any(name))

    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (
        tensors[f"base_model.model.{LAYER}.lora_{letter}.weight"].float()
        for letter in "AB"
    )
    before, after = (
        load_file(path / "model.safetensors")[f"{LAYER}.weight"]
        for path in (smollm2, folder)
    )
    expected = before.float() + config["lora_alpha"] / config["r"] * (b @ a)
    torch.testing.assert_close(after, expected.to(torch.bfloat16))
    assert not torch.equal(after, before)

    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert Path(find_any(name)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert folder.is_relative_to(tmp_path)
