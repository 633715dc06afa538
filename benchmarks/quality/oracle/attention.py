# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model's attention, handed over to a live batch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from benchmarks.quality.oracle.live_batch import LiveBatch

_NAME = "quality_oracle"
# each would change which keys a query sees, or how it weighs them
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


def load_model(model: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a decoder whose forward takes `live_batch`, a `LiveBatch`.

    Args:
        model: Hugging Face folder.
        device: Where to.
        dtype: Of weights, keys and values.
    """
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, attn_implementation=_NAME
    )
    loaded.requires_grad_(False)
    torch.nn.Module.to(loaded, device)
    torch.nn.Module.eval(loaded)
    return loaded


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    live_batch: LiveBatch,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks for it: `[n, heads, q, head size]` each.

    Raises:
        NotImplementedError: The model wants more than plain causal attention.
    """
    for name in _UNSUPPORTED:
        if arguments.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__}: {name} = {arguments[name]!r} is not "
                "simulated. Use a model with plain causal attention."
            )
    layer = module.layer_idx
    assert isinstance(layer, int)
    return live_batch.attend(layer, query, key, value, scaling), None


AttentionInterface.register(_NAME, _attend)
