# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform, with the attention backend that the user chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from typing_extensions import override
from vllm.logger import init_logger
from vllm.platforms import cpu_platform_plugin
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_roco.backend_name import BACKEND_NAME
from vllm_roco.config import NAMESPACE
from vllm_roco.observability.trace import check_path
from vllm_roco.scheduler_choice import check_scheduler_class
from vllm_roco.validation import has_windows, is_selected, validated_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    StockPlatform = CpuPlatform
else:
    # vLLM has a platform of its own for AMD Zen
    path = cpu_platform_plugin()
    StockPlatform = CpuPlatform if path is None else resolve_obj_by_qualname(path)

logger = init_logger(f"vllm.{__name__}")

PREFERRED_BLOCK_SIZE = 16
MIXED_BLOCK_SIZE = 32
"""Tokens. The smallest blocks of vLLM's own attention on CPUs, which serves layers with
a window: with blocks of one size, no page of either is padded."""


class RocoCpuPlatform(StockPlatform):
    """The stock CPU platform unless a layer's backend is ROCO."""

    @classmethod
    @override
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
        # as vLLM's CUDA platform does, see `attention.selection`
        chooser = selected_backend.get_class()
        reasons = chooser.validate_configuration(
            # a CPU has none, and RoCo's checks do not ask for it
            device_capability=None,  # type: ignore[arg-type]
            **attn_selector_config._asdict(),
        )
        if reasons:
            raise ValueError(
                f"roco: an attention layer of this model is refused: "
                f"{'; '.join(reasons)}. Or use another --attention-backend."
            )
        return ".".join(chooser.full_cls_name())

    @classmethod
    @override
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check RoCo's options early, and prefer small blocks."""
        if not is_selected(vllm_config):
            additional = vllm_config.additional_config
            if isinstance(additional, Mapping) and NAMESPACE in additional:
                logger.warning_once(
                    "roco: additional_config has options for RoCo, but no layer uses "
                    "it. Add --attention-backend roco, or remove them."
                )
            super().check_and_update_config(vllm_config)
            return
        config = validated_config(vllm_config)
        if config.trace is not None:
            # the engine core would raise too, but perhaps from a process of its own
            check_path(config.trace)
        if vllm_config.scheduler_config.scheduler_cls is not None:
            check_scheduler_class(vllm_config)
        super().check_and_update_config(vllm_config)
        cache_config = vllm_config.cache_config
        if not cache_config.user_specified_block_size:
            mixed = has_windows(vllm_config)
            size = MIXED_BLOCK_SIZE if mixed else PREFERRED_BLOCK_SIZE
            cache_config.block_size = size
            config.check_block_size(size)
