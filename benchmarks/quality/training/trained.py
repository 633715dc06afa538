# SPDX-License-Identifier: Apache-2.0
"""The model of the adapter that lies here, merged on first use."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from tools.packaged_models import PACKAGED_MODELS, SMOLLM2, find_model, make_once

TRAINED = f"{SMOLLM2}-trained"
"""Its name, beside those of `PACKAGED_MODELS`."""
ADAPTER = Path(__file__).with_name("adapters") / "smollm2-135m"
"""What it adds to SmolLM2; `training.json` there says how it was made."""


def find_any(model: str) -> str:
    """Return the folder of a model, which is made if need be.

    Args:
        model: `TRAINED`, one of `PACKAGED_MODELS`, or a Hugging Face folder.

    Raises:
        ModuleNotFoundError: A folder has to be made, but its package is missing.
    """
    if model == TRAINED:
        return str(find_trained())
    return str(find_model(model)) if model in PACKAGED_MODELS else model


def find_trained() -> Path:
    """Return the folder of `TRAINED`, made on the first call, anew for a new adapter.

    Raises:
        ModuleNotFoundError: It has to be made, but SmolLM2's package is missing.
    """
    files = b"".join(path.read_bytes() for path in sorted(ADAPTER.glob("adapter_*")))

    def write(folder: Path) -> None:
        write_merged(str(find_model(SMOLLM2)), ADAPTER, folder)

    return make_once(f"{TRAINED}-{sha256(files).hexdigest()[:8]}", write)


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
