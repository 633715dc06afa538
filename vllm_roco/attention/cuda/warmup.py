# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel that serving can launch, before serving begins.

vLLM collects what is to be compiled while it builds a model's layers, and compiles it
once their caches are bound, before it captures graphs. It does not where its JIT
warm-up is off, as with `--enforce-eager`, and then nothing is compiled here either.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from triton import knobs
from typing_extensions import override
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel

from vllm_roco.attention.cuda.metadata import (
    IDLE_TOKENS,
    HasBuilder,
    RocoCudaMetadataBuilder,
)
from vllm_roco.attention.layers import roco_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionLayer

logger = init_logger(f"vllm.{__name__}")

DIVISOR = 16
"""Triton compiles a variant for numbers that are a multiple of it, and one for others.
"""


class KernelWarmUp(VllmJitKernel[Attention]):
    """Sends the idle steps of its group through every layer; that launches everything.

    What a layer's kernels are compiled for depends on its cache, scales and sinks, so
    no layer stands for another. What was compiled for one is there for its like.
    """

    @override
    def get_warmup_keys(self, vllm_config: VllmConfig, **_: Any) -> list[Attention]:
        """Return a worker's layers that can be served, see `compile`."""
        return [x for x in roco_layers(vllm_config) if _builder_of(x) is not None]

    @override
    @torch.inference_mode()
    def compile(self, compile_key: Attention) -> None:
        """Launch each variant of the kernels that a layer can need.

        Args:
            compile_key: The layer; its cache is bound, and nothing is written there.
        """
        layer = compile_key
        builder = _builder_of(layer)
        assert builder is not None, "a layer without a builder has no warm-up"
        dtype = cast("torch.dtype", builder.vllm_config.model_config.dtype)
        size = layer.num_heads, layer.head_size
        output = torch.empty(IDLE_TOKENS, *size, dtype=dtype, device=builder.device)
        for stride in _query_strides(*size):
            memory = torch.zeros(IDLE_TOKENS, stride, dtype=dtype, device=output.device)
            query = memory[:, : size[0] * size[1]].unflatten(1, size)
            for step in builder.idle_steps():
                layer.impl.forward(
                    # vLLM's own layers are not typed as one
                    cast("AttentionLayer", layer),
                    query,
                    query,
                    query,
                    layer.kv_cache,
                    step,
                    output,
                )

    @override
    def compile_many(self, compile_keys: Iterable[Attention]) -> None:
        """Do so for layers, and tell how long it took."""
        begun = time.perf_counter()
        with _counted_kernels() as count:
            super().compile_many(compile_keys)
        logger.info(
            "roco: %d kernels were compiled, or loaded from Triton's cache, in %.1f s.",
            count(),
            time.perf_counter() - begun,
        )


KERNEL_WARM_UP = KernelWarmUp()
"""What vLLM is told of when a layer is built."""


def _builder_of(layer: Attention) -> RocoCudaMetadataBuilder | None:
    """Return who builds a layer's steps, None before there are caches."""
    reference = cast("HasBuilder", layer.impl).builder
    return None if reference is None else reference()


def _query_strides(num_heads: int, head_size: int) -> list[int]:
    """Return numbers from one token's query to the next one's, one of each kind.

    Queries lie by themselves or beside keys and values, which differs between models
    and between a model's compiled forms; the stride is whole heads in any case.
    """
    numbers = num_heads * head_size
    aligned = -(-numbers // DIVISOR) * DIVISOR
    return [aligned] if head_size % DIVISOR == 0 else [aligned, aligned + DIVISOR // 2]


@contextlib.contextmanager
def _counted_kernels() -> Iterator[Any]:
    """Count the kernels that this process had not loaded."""
    names: list[str] = []
    hook = knobs.runtime.jit_post_compile_hook

    def count(**compiled: Any) -> Any:
        names.append(compiled["fn"].name)
        return hook(**compiled) if hook is not None else None

    knobs.runtime.jit_post_compile_hook = count
    try:
        yield lambda: len(names)
    finally:
        knobs.runtime.jit_post_compile_hook = hook
