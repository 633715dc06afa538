# SPDX-License-Identifier: Apache-2.0
"""Which tokens end a turn of a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_roco.config import is_integer

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_roco.config import RocoConfig


def turn_end_token_ids(config: RocoConfig, model_config: ModelConfig) -> frozenset[int]:
    """Return the tokens behind which the chunks of a prompt may end.

    By default those with which the model ends its answers, as its configuration and its
    generation configuration have them: chat templates put one behind every message, or
    behind every answer.

    Args:
        config: The options.
        model_config: vLLM's.

    Returns:
        Token ids; none if the model names no end token.
    """
    if config.turn_end_token_ids is not None:
        return frozenset(config.turn_end_token_ids)
    found = (
        getattr(model_config.hf_config, "eos_token_id", None),
        getattr(model_config.hf_text_config, "eos_token_id", None),
        model_config.try_get_generation_config().get("eos_token_id"),
    )
    return frozenset(token for ids in found for token in _listed(ids))


def _listed(ids: Any) -> list[int]:
    """Return the ids among what a file may hold there, of whatever type."""
    listed = ids if isinstance(ids, list | tuple) else [ids]
    return [token for token in listed if is_integer(token, 0)]
