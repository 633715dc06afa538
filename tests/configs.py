# SPDX-License-Identifier: Apache-2.0
"""vLLM's own configuration of a model that has a shape but no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 1 << 20,
}


def engine_config(folder: Path, roco: dict[str, Any], **arguments: Any) -> VllmConfig:
    """Return what `vllm serve --attention-backend roco` would run with.

    Args:
        folder: An empty folder, for the model's `config.json`.
        roco: The options.
        **arguments: Further arguments of `EngineArgs`.
    """
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        attention_backend="roco",
        additional_config={"roco": roco},
        **arguments,
    ).create_engine_config()
