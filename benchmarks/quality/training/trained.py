# SPDX-License-Identifier: Apache-2.0
"""The models of the adapters that lie here, merged on first use."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from tools.packaged_models import PACKAGED_MODELS, SMOLLM2, find_model, make_once

TRAINED = f"{SMOLLM2}-trained"
"""Solves what is read, by its name beside those of `PACKAGED_MODELS`."""
DERIVING = f"{SMOLLM2}-deriving"
"""Works out long derivations, too."""
_ADAPTERS = Path(__file__).with_name("adapters")
ADAPTER = _ADAPTERS / "smollm2-135m"
ADAPTERS = {TRAINED: ADAPTER, DERIVING: _ADAPTERS / "smollm2-135m-deriving"}
"""What is added to SmolLM2; `training.json` there says how it was made."""


def find_any(model: str) -> str:
    """Return the folder of a model, which is made if need be.

    Args:
        model: One of `ADAPTERS`, one of `PACKAGED_MODELS`, or a Hugging Face folder.

    Raises:
        ModuleNotFoundError: A folder has to be made, but its package is missing.
    """
    if model in ADAPTERS:
        return str(find_trained(model))
    return str(find_model(model)) if model in PACKAGED_MODELS else model


def find_trained(model: str = TRAINED) -> Path:
    """Return the folder of one of `ADAPTERS`, made on the first call.

    It is made anew for a new adapter.

    Raises:
        ModuleNotFoundError: It has to be made, but SmolLM2's package is missing.
    """
    adapter = ADAPTERS[model]
    files = b"".join(path.read_bytes() for path in sorted(adapter.glob("adapter_*")))

    def write(folder: Path) -> None:
        write_merged(str(find_model(SMOLLM2)), adapter, folder)

    return make_once(f"{model}-{sha256(files).hexdigest()[:8]}", write)


def write_merged(base: str, adapter: Path, out: Path) -> None:
    """Write a model's folder with an adapter added to its weights.

    Args:
        base: Folder of the model that the adapter was trained for.
        adapter: Folder of the adapter.
        out: Folder that is written, in bfloat16.

    Raises:
        ValueError: The adapter is not of this model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.quality.training import low_rank

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    low_rank.merge(model, adapter)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
