# SPDX-License-Identifier: Apache-2.0
"""The class that vLLM's attention selector gets for `--attention-backend roco`.

It says what is supported and gives every layer its KV cache spec; attending is left to
the implementation of the platform.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import override
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from vllm_roco.attention.current_config import current_vllm_config
from vllm_roco.backend_name import BACKEND_NAME
from vllm_roco.kv_cache.spec import RocoSpec
from vllm_roco.validation import (
    KERNEL_BLOCK_SIZE,
    KV_CACHE_DTYPES,
    OTHER_KV_CACHE_DTYPE,
    validated_config,
)

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType
    from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

_WHAT_TO_DO = {
    "MLA not supported": "multi-head latent attention is not supported",
    "block_size not supported": (
        f"the block size must be a multiple of {KERNEL_BLOCK_SIZE} tokens; change "
        "--block-size"
    ),
    "kv_cache_dtype not supported": (
        f"this kv_cache_dtype is not supported. {OTHER_KV_CACHE_DTYPE}"
    ),
}


class RocoBackend(AttentionBackend):
    """Attention over a bounded KV cache; see `AttentionBackend` for each hook."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [*KV_CACHE_DTYPES]

    @staticmethod
    @override
    def get_name() -> str:
        """The member of `AttentionBackendEnum` that `register` adds."""
        return BACKEND_NAME

    @staticmethod
    @override
    def get_impl_cls() -> type[AttentionImpl[Any]]:
        """The implementation of this platform.

        Raises:
            NotImplementedError: The platform is neither a CPU nor CUDA.
        """
        if current_platform.is_cpu():
            from vllm_roco.attention.cpu.impl import RocoCpuImpl

            return RocoCpuImpl
        if current_platform.is_cuda():
            from vllm_roco.attention.cuda.impl import RocoCudaImpl

            return RocoCudaImpl
        raise _unsupported_platform()

    @staticmethod
    @override
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        """The metadata builder of this platform; raises as `get_impl_cls` does."""
        if current_platform.is_cpu():
            from vllm_roco.attention.cpu.metadata import RocoCpuMetadataBuilder

            return RocoCpuMetadataBuilder
        if current_platform.is_cuda():
            from vllm_roco.attention.cuda.metadata import RocoCudaMetadataBuilder

            return RocoCudaMetadataBuilder
        raise _unsupported_platform()

    @staticmethod
    @override
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """Any multiple of 16: RoCo must see the block manager's own blocks."""
        return [MultipleOf(KERNEL_BLOCK_SIZE)]

    @classmethod
    @override
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """The layouts whose pages are contiguous, so that they can have a tail."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC)

    @classmethod
    @override
    def supports_sink(cls) -> bool:
        """A learned logit in the softmax's denominator, one a query head."""
        return True

    @classmethod
    @override
    def supports_per_head_quant_scales(cls) -> bool:
        """Scales of an fp8 cache may be one for each kv head."""
        return True

    @classmethod
    @override
    def supports_kv_connector(cls) -> bool:
        """Connectors move blocks by position, which eviction gives up."""
        return False

    @classmethod
    @override
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Return vLLM's reasons against a layer, each with what to do about it."""
        reasons = super().validate_configuration(*args, **kwargs)
        return [_WHAT_TO_DO.get(reason, reason) for reason in reasons]

    @classmethod
    @override
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Turn vLLM's full-attention spec into RoCo's; leave other kinds alone.

        Raises:
            ValueError: The options do not fit the block size.
            NotImplementedError: Values have another size than keys.
        """
        if type(spec) is not FullAttentionSpec:
            return spec
        if spec.head_size_v != spec.head_size:
            raise NotImplementedError(
                f"roco: layers with values of another size than keys (head_size_v = "
                f"{spec.head_size_v}, head_size = {spec.head_size}) are not supported. "
                "Use another --attention-backend."
            )
        vllm_config = current_vllm_config()
        config = validated_config(vllm_config)
        # vLLM also asks with a block of one token, for a page size per token
        if spec.block_size > 1:
            config.check_block_size(spec.block_size)
        return RocoSpec.from_attention_spec(
            spec, config, vllm_config.max_concurrent_batches
        )


def _unsupported_platform() -> NotImplementedError:
    return NotImplementedError(
        f"roco: platform {current_platform.device_name!r} is not supported; the ROCO "
        "backend runs on CPUs and NVIDIA GPUs. Use another --attention-backend."
    )
