# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform, with the attention backend that the user chose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

from vllm_roco.validation import BACKEND_NAME, is_selected, validated_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

PREFERRED_BLOCK_SIZE = 16


class RocoCpuPlatform(CpuPlatform):
    """The stock CPU platform unless a layer's backend is ROCO."""

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: AttentionBackendEnum,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        """Return the class path of the chosen backend.

        Raises:
            ValueError: ROCO was chosen for a layer that it does not support.
        """
        if selected_backend is None or selected_backend.name != BACKEND_NAME:
            return super().get_attn_backend_cls(
                selected_backend, attn_selector_config, num_heads
            )
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(
                f"roco: this layer is not supported: {'; '.join(reasons)}. Otherwise "
                "use another --attention-backend."
            )
        return selected_backend.get_path()

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check RoCo's options early, and prefer blocks of 16 tokens."""
        selected = is_selected(vllm_config)
        cache_config = vllm_config.cache_config
        if selected:
            validated_config(vllm_config)
        super().check_and_update_config(vllm_config)
        if selected and not cache_config.user_specified_block_size:
            cache_config.block_size = PREFERRED_BLOCK_SIZE
            validated_config(vllm_config).check_block_size(PREFERRED_BLOCK_SIZE)
