# SPDX-License-Identifier: Apache-2.0
"""One step of a model's attention layers, for each kernel that can do it.

All kernels read the same memory, through views of their own: only shapes and strides
decide how fast they are. Pages lie in random order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from benchmarks.kernels.measuring import COLD_BYTES
from vllm_roco import reference
from vllm_roco.kv_cache import page
from vllm_roco.ops.decode.attention import decode_attention
from vllm_roco.ops.decode.plan import DecodePlan, DecodeScratch, DecodeScratchSize
from vllm_roco.ops.prefill_mass import PrefillPlan, measure_prefill

DTYPE = torch.bfloat16
SMALLEST_BLOCK = 16
MOST_LAYERS = 24

Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A batch of equally long sequences and the heads of a layer.

    Attributes:
        batch: Sequences.
        context: Tokens that each attends over.
        q_heads: Query heads.
        kv_heads: KV heads.
        head_size: Numbers per head.
        query_len: Queries of each sequence, its newest tokens.
    """

    batch: int
    context: int
    q_heads: int
    kv_heads: int
    head_size: int
    query_len: int = 1

    def __str__(self) -> str:
        heads = f"{self.q_heads}/{self.kv_heads}/{self.head_size}"
        return f"{self.batch} x {self.query_len} of {self.context}, {heads}"

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that a layer's attention has to read."""
        tokens = self.batch * self.context
        return tokens * self.kv_heads * 2 * self.head_size * DTYPE.itemsize

    @property
    def layers(self) -> int:
        """Layers whose caches together are too large for the L2 cache."""
        return min(MOST_LAYERS, max(2, -(-COLD_BYTES // self.kv_bytes)))

    @property
    def layer_numel(self) -> int:
        """Elements set aside for a layer, for pages of any size, tails included."""
        pages = self.batch * -(-self.context // SMALLEST_BLOCK)
        tail = page.statistics_bytes(self.kv_heads) // DTYPE.itemsize
        slack = 256 * self.batch * self.kv_heads * 2 * self.head_size
        return self.kv_bytes // DTYPE.itemsize + pages * tail + slack


WORK = [(1, 32768), (8, 2048), (16, 16384), (64, 2048), (128, 1024), (256, 2048)]
HEADS = [(32, 8, 128), (28, 4, 128), (64, 8, 128), (9, 3, 64), (32, 32, 128)]
SHAPES = [Shape(*work, *heads) for heads in HEADS for work in WORK]


def allocate_pool(shapes: list[Shape]) -> torch.Tensor:
    """Return memory that holds every layer of any one of the shapes."""
    numel = max(shape.layers * shape.layer_numel for shape in shapes)
    return torch.empty(numel, dtype=DTYPE, device="cuda")


class Workload:
    """A shape's queries, lengths and tables, over freshly drawn keys and values.

    Args:
        shape: What to attend over.
        pool: Memory of `allocate_pool`.
    """

    def __init__(self, shape: Shape, pool: torch.Tensor) -> None:
        self.shape = shape
        self.pool = pool[: shape.layers * shape.layer_numel]
        self.pool.normal_()
        device = pool.device
        self.query = torch.randn(
            shape.batch * shape.query_len,
            shape.q_heads,
            shape.head_size,
            dtype=DTYPE,
            device=device,
        )
        self.output = torch.empty_like(self.query)
        self.lengths = torch.full(
            (shape.batch,), shape.context, dtype=torch.int32, device=device
        )
        self.evicted = torch.zeros_like(self.lengths)
        self.query_starts = shape.query_len * torch.arange(
            shape.batch + 1, dtype=torch.int32, device=device
        )
        self.scale = shape.head_size**-0.5

    def table(self, block_size: int) -> torch.Tensor:
        """Return `[batch, blocks]` int32, the pages in random order."""
        width = triton.cdiv(self.shape.context, block_size)
        count = self.shape.batch * width
        order = torch.randperm(count, device=self.pool.device)
        return order.to(torch.int32).view(self.shape.batch, width)

    def cache(
        self, layer: int, block_size: int, *, token_major: bool, tail: bool
    ) -> torch.Tensor:
        """Return a layer's `[num_blocks, kv_heads, block_size, 2 * head_size]` view."""
        shape = self.shape
        content = 2 * shape.head_size
        size = shape.kv_heads * block_size * content
        if tail:
            size += page.statistics_bytes(shape.kv_heads) // DTYPE.itemsize
        inner = (
            (content, shape.kv_heads * content)
            if token_major
            else (block_size * content, content)
        )
        blocks = shape.batch * triton.cdiv(shape.context, block_size)
        return self.pool.as_strided(
            (blocks, shape.kv_heads, block_size, content),
            (size, *inner, 1),
            layer * shape.layer_numel,
        )

    def roco(
        self,
        plan: DecodePlan,
        *,
        block_size: int = 16,
        token_major: bool = False,
        measure: bool = True,
        table: torch.Tensor | None = None,
    ) -> list[Call]:
        """Return our decode kernels' calls, one a layer.

        Args:
            plan: Layout of the launch.
            block_size: Tokens per page.
            token_major: Whether the page is `[token, head]`.
            measure: Whether statistics are kept.
            table: Block table, drawn at random if None.
        """
        shape = self.shape
        if table is None:
            table = self.table(block_size)
        scratch = DecodeScratch.allocate(
            DecodeScratchSize.of(
                plans=[(shape.batch, plan)],
                num_q_heads=shape.q_heads,
                head_size=shape.head_size,
                block_size=block_size,
                max_live_tokens=shape.context,
                measure=measure,
            ),
            self.pool.device,
        )

        def call(layer: int) -> Call:
            cache = self.cache(layer, block_size, token_major=token_major, tail=True)
            statistics = page.statistics_view(cache) if measure else None
            if statistics is not None:
                statistics.zero_()
            return lambda: decode_attention(
                query=self.query,
                kv_cache=cache,
                live_table=table,
                live_lens=self.lengths,
                evicted_before=self.evicted,
                statistics=statistics,
                output=self.output,
                scratch=scratch,
                plan=plan,
                scale=self.scale,
            )

        return [call(layer) for layer in range(shape.layers)]

    def prefill_mass(
        self,
        plan: PrefillPlan,
        *,
        block_size: int = 16,
        token_major: bool = False,
        table: torch.Tensor | None = None,
    ) -> list[Call]:
        """Return our prompt kernel's calls, one a layer; arguments as of `roco`."""
        shape = self.shape
        if table is None:
            table = self.table(block_size)
        # any log-sum-exp will do for timing: weights above 1 cost what others do
        lse = torch.full(
            (shape.q_heads, shape.batch * shape.query_len),
            math.log(shape.context),
            device=self.pool.device,
        )

        def call(layer: int) -> Call:
            cache = self.cache(layer, block_size, token_major=token_major, tail=True)
            statistics = page.statistics_view(cache)
            statistics.zero_()
            return lambda: measure_prefill(
                query=self.query,
                kv_cache=cache,
                lse=lse,
                query_start_loc=self.query_starts,
                live_table=table,
                live_lens=self.lengths,
                evicted_before=self.evicted,
                statistics=statistics,
                max_live_tokens=shape.context,
                plan=plan,
                scale=self.scale,
            )

        return [call(layer) for layer in range(shape.layers)]

    def flash(
        self, *, block_size: int, token_major: bool, max_splits: int
    ) -> list[Call]:
        """Return vLLM's own FlashAttention 3 calls, one a layer.

        Args:
            block_size: Tokens per page.
            token_major: Whether the page is `[token, head]`, vLLM's default.
            max_splits: Bound of the splits; 0 lets FlashAttention choose.
        """
        from vllm.vllm_flash_attn.flash_attn_interface import (
            flash_attn_varlen_func,
            get_scheduler_metadata,
        )

        shape = self.shape
        table = self.table(block_size)
        # worked out once a step, for all layers, so it is no part of a layer's time
        metadata = get_scheduler_metadata(
            batch_size=shape.batch,
            max_seqlen_q=shape.query_len,
            max_seqlen_k=shape.context,
            num_heads_q=shape.q_heads,
            num_heads_kv=shape.kv_heads,
            headdim=shape.head_size,
            cache_seqlens=self.lengths,
            qkv_dtype=DTYPE,
            cu_seqlens_q=self.query_starts,
            page_size=block_size,
            causal=True,
            num_splits=max_splits,
        )

        def call(layer: int) -> Call:
            cache = self.cache(layer, block_size, token_major=token_major, tail=False)
            keys, values = cache.transpose(1, 2).split(shape.head_size, -1)
            return lambda: flash_attn_varlen_func(
                q=self.query,
                k=keys,
                v=values,
                max_seqlen_q=shape.query_len,
                cu_seqlens_q=self.query_starts,
                max_seqlen_k=shape.context,
                seqused_k=self.lengths,
                softmax_scale=self.scale,
                causal=True,
                block_table=table,
                out=self.output,
                scheduler_metadata=metadata,
                num_splits=max_splits,
                fa_version=3,
            )

        return [call(layer) for layer in range(shape.layers)]

    def xformers(self) -> list[Call]:
        """Return xformers' paged split-K calls, one a layer, with pages of 64."""
        from xformers.ops import fmha
        from xformers.ops.fmha.attn_bias import (
            BlockDiagonalCausalWithOffsetPaddedKeysMask,
            PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
        )

        shape, block_size = self.shape, 64
        table = self.table(block_size)
        bias = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=[1] * shape.batch,
            kv_seqlen=[shape.context] * shape.batch,
            kv_padding=table.shape[1] * block_size,
            device=self.pool.device,
        ).make_paged(
            block_tables=table,
            page_size=block_size,
            paged_type=PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
        )
        group = shape.q_heads // shape.kv_heads
        tokens = table.numel() * block_size
        half = tokens * shape.kv_heads * shape.head_size
        query = self.query.view(1, shape.batch, shape.kv_heads, group, shape.head_size)

        def expanded(flat: torch.Tensor) -> torch.Tensor:
            heads = flat.view(1, tokens, shape.kv_heads, 1, shape.head_size)
            return heads.expand(1, tokens, shape.kv_heads, group, shape.head_size)

        def call(layer: int) -> Call:
            # keys and values of their own: it takes no interleaved ones
            start = layer * shape.layer_numel
            keys = expanded(self.pool[start : start + half])
            values = expanded(self.pool[start + half : start + 2 * half])
            return lambda: fmha.memory_efficient_attention_forward(
                query, keys, values, attn_bias=bias, op=fmha.triton_splitk.FwOp
            )

        return [call(layer) for layer in range(shape.layers)]

    def check(self, plan: DecodePlan, *, block_size: int, token_major: bool) -> None:
        """Raise unless our first layer's output and masses are as they should be.

        Rows at both ends and in the middle are compared with float32; bfloat16 products
        of the same reference tell what error to expect.

        Args:
            plan: Layout of the launch.
            block_size: Tokens per page.
            token_major: Whether the page is `[token, head]`.
        """
        self.pool.normal_()
        cache = self.cache(0, block_size, token_major=token_major, tail=True)
        statistics = page.statistics_view(cache)
        table = self.table(block_size)
        calls = self.roco(
            plan, block_size=block_size, token_major=token_major, table=table
        )
        self.output.fill_(float("nan"))
        calls[0]()
        if not self.output.isfinite().all():
            raise AssertionError(f"{self.shape}: {plan} leaves NaN in the output")
        for row in sorted({0, self.shape.batch // 2, self.shape.batch - 1}):
            exact, low = (
                reference.attend(
                    query=self.query[row : row + 1],
                    kv_cache=cache,
                    blocks=table[row],
                    live_len=self.shape.context,
                    scale=self.scale,
                    dtype=dtype,
                )
                for dtype in (torch.float32, DTYPE)
            )
            error = (self.output[row].float() - exact.output[0]).abs().max()
            allowed = 2 * (low.output[0].float() - exact.output[0]).abs().max()
            if not error <= allowed:
                raise AssertionError(
                    f"{self.shape}: {plan} errs by {error:.2e} in row {row}, where "
                    f"bfloat16 products err by {allowed / 2:.2e}"
                )
            masses = statistics[table[row].long(), :, page.MASS_SUM]
            torch.testing.assert_close(masses, exact.mass[0].T, rtol=1e-3, atol=1e-6)
