# SPDX-License-Identifier: Apache-2.0
"""Model folders with a configuration and no weights, for `load_format="dummy"`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
"""A small decoder, in the words of most Hugging Face configurations."""


def save_config(
    folder: Path, model_type: str, architecture: str, **changes: Any
) -> Path:
    """Write the configuration of a tiny model.

    Args:
        folder: Where to; made if it is not there.
        model_type: The Hugging Face model type.
        architecture: Name of the model class.
        **changes: Added to `TINY`, or put in its place.

    Returns:
        `folder`.
    """
    config = AutoConfig.for_model(
        model_type, architectures=[architecture], **(TINY | changes)
    )
    config.save_pretrained(folder)
    return folder
