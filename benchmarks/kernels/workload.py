# SPDX-License-Identifier: Apache-2.0
"""One step of a model's attention layers, for each kernel that can do it.

All kernels read the same memory, through views of their own: only shapes and strides
decide how fast they are. Pages lie in random order. An fp8 cache is for ours alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import triton

from benchmarks.kernels.measuring import COLD_BYTES
from vllm_roco import fp8_cache, reference
from vllm_roco.kv_cache import page
from vllm_roco.ops.decode.attention import decode_attention
from vllm_roco.ops.decode.plan import (
    DecodePlan,
    DecodeScratch,
    DecodeScratchSize,
    plan_decode,
)
from vllm_roco.ops.decode.splits import DecodeSplits
from vllm_roco.ops.device import Device
from vllm_roco.ops.prefill_mass import measure_prefill
from vllm_roco.ops.prefill_plan import PrefillPlan, PrefillScratch

DTYPE = torch.bfloat16
SMALLEST_BLOCK = 16
MOST_LAYERS = 24

Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A batch of sequences and the heads of a layer.

    Attributes:
        batch: Sequences.
        context: Tokens that each attends over, or the longest one.
        q_heads: Query heads.
        kv_heads: KV heads.
        head_size: Numbers per head.
        query_len: Queries of each sequence, its newest tokens.
        fp8: Whether keys and values are bytes.
        shortest: Tokens that the shortest attends over, 0 for all alike. The others lie
            between, as many in each octave, in no order.
    """

    batch: int
    context: int
    q_heads: int
    kv_heads: int
    head_size: int
    query_len: int = 1
    fp8: bool = False
    shortest: int = 0

    def __str__(self) -> str:
        heads = "/".join(map(str, self.heads))
        cache = ", fp8" if self.fp8 else ""
        context = (
            f"{self.shortest} to {self.context}" if self.shortest else self.context
        )
        return f"{self.batch} x {self.query_len} of {context}, {heads}{cache}"

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads and head size."""
        return self.q_heads, self.kv_heads, self.head_size

    @property
    def cache_dtype(self) -> torch.dtype:
        """Element type of keys and values in memory."""
        return torch.uint8 if self.fp8 else DTYPE

    @property
    def lengths(self) -> list[int]:
        """Tokens that each sequence attends over."""
        lengths = np.geomspace(self.shortest or self.context, self.context, self.batch)
        drawn = np.random.default_rng(0).permutation(lengths)
        return [round(float(length)) for length in drawn]

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that a layer's attention has to read."""
        tokens = sum(self.lengths)
        return tokens * self.kv_heads * 2 * self.head_size * self.cache_dtype.itemsize

    @property
    def layers(self) -> int:
        """Layers whose caches together are too large for the L2 cache."""
        return min(MOST_LAYERS, max(2, -(-COLD_BYTES // self.kv_bytes)))

    @property
    def layer_numel(self) -> int:
        """Elements set aside for a layer, for pages of any size, tails included."""
        pages = self.batch * -(-self.context // SMALLEST_BLOCK)
        tail = page.statistics_bytes(self.kv_heads) // DTYPE.itemsize
        slots = self.batch * (self.context + 256)
        token = self.kv_heads * 2 * self.head_size * self.cache_dtype.itemsize
        return slots * token // DTYPE.itemsize + pages * tail

    def plan(self, device: Device) -> DecodePlan:
        """Return what the engine would run on a device."""
        return plan_decode(
            num_rows=self.batch,
            num_kv_heads=self.kv_heads,
            head_size=self.head_size,
            max_live_tokens=self.context,
            dtype=self.cache_dtype,
            device=device,
        )

    def splits(self, plan: DecodePlan, device: torch.device) -> DecodeSplits:
        """Allocate what tells a plan's programs what to attend over."""
        return DecodeSplits.allocate([(self.batch, plan)], self.kv_heads, device)

    def scratch(
        self, plan: DecodePlan, device: torch.device, *, block_size: int, measure: bool
    ) -> DecodeScratch:
        """Allocate what a plan's kernels need to tell each other."""
        size = DecodeScratchSize.of(
            plans=[(self.batch, plan)],
            num_q_heads=self.q_heads,
            head_size=self.head_size,
            block_size=block_size,
            max_live_tokens=self.context,
            measure=measure,
        )
        return DecodeScratch.allocate(size, device)


WORK = [(1, 32768), (8, 2048), (16, 16384), (64, 2048), (128, 1024), (256, 2048)]
HEADS = [(32, 8, 128), (28, 4, 128), (64, 8, 128), (9, 3, 64), (32, 32, 128)]
SHAPES = [Shape(*work, *heads) for heads in HEADS for work in WORK]
UNEVEN = [
    Shape(batch, longest, *heads, shortest=shortest)
    for heads in HEADS[:2]
    for batch in (16, 32, 48, 64, 96, 128, 160, 256)
    for shortest, longest in ((200, 3200), (2048, 2303))
]
"""Chats, at whatever point each of them is, and rows that evict a stride at a time."""


def allocate_pool(shapes: list[Shape]) -> torch.Tensor:
    """Return memory that holds every layer of any one of the shapes, fp8 or not."""
    every = [replace(shape, fp8=fp8) for shape in shapes for fp8 in (False, True)]
    numel = max(shape.layers * shape.layer_numel for shape in every)
    return torch.empty(numel, dtype=DTYPE, device="cuda")


class Workload:
    """A shape's queries, lengths and tables, over freshly drawn keys and values.

    Args:
        shape: What to attend over.
        pool: Memory of `allocate_pool`.
    """

    def __init__(self, shape: Shape, pool: torch.Tensor) -> None:
        self.shape = shape
        self._whole_pool = pool
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
        self.lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=device)
        self.evicted = torch.zeros_like(self.lengths)
        self.query_starts = shape.query_len * torch.arange(
            shape.batch + 1, dtype=torch.int32, device=device
        )
        self.scale = shape.head_size**-0.5
        self.kv_scale = torch.tensor(0.5, device=device) if shape.fp8 else None

    def over(self, *, fp8: bool) -> Workload:
        """Return the same work over a cache of the other kind, in the same memory."""
        return Workload(replace(self.shape, fp8=fp8), self._whole_pool)

    def table(self, block_size: int) -> torch.Tensor:
        """Return `[batch, blocks]` int32, the pages in random order."""
        width = triton.cdiv(self.shape.context, block_size)
        count = self.shape.batch * width
        order = torch.randperm(count, device=self.pool.device)
        return order.to(torch.int32).view(self.shape.batch, width)

    def caches(
        self, block_size: int, *, token_major: bool, has_statistics: bool
    ) -> Iterator[torch.Tensor]:
        """Yield each layer's `[num_blocks, kv_heads, block_size, 2 * head_size]`."""
        shape = self.shape
        states = (shape.kv_heads, block_size, 2 * shape.head_size)
        tail = page.statistics_bytes(shape.kv_heads) // shape.cache_dtype.itemsize
        blocks = shape.batch * triton.cdiv(shape.context, block_size)
        for memory in self.pool.split(shape.layer_numel):
            cache = reference.paged_view(
                memory.view(shape.cache_dtype),
                blocks,
                states,
                tail * has_statistics,
                token_major=token_major,
            )
            if has_statistics:
                page.statistics_view(cache).zero_()
            yield cache

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
        splits = self.shape.splits(plan, self.pool.device)
        splits.deal(self.lengths, plan)
        kernel = partial(
            decode_attention,
            splits=splits,
            measured_lens=self.lengths,
            k_scale=self.kv_scale,
            v_scale=self.kv_scale,
        )
        return self.calls(
            kernel,
            plan,
            block_size=block_size,
            token_major=token_major,
            measure=measure,
            table=table,
        )

    def calls(
        self,
        kernel: Callable[..., object],
        plan: DecodePlan,
        *,
        block_size: int,
        token_major: bool = False,
        measure: bool = True,
        table: torch.Tensor | None = None,
    ) -> list[Call]:
        """Return a kernel's calls, one a layer; other arguments as of `roco`.

        Args:
            kernel: Takes the required keyword arguments of `decode_attention` except
                `splits` and `measured_lens`.
        """
        if table is None:
            table = self.table(block_size)
        scratch = self.shape.scratch(
            plan, self.pool.device, block_size=block_size, measure=measure
        )
        return [
            partial(
                kernel,
                query=self.query,
                kv_cache=cache,
                live_table=table,
                live_lens=self.lengths,
                evicted_before=self.evicted,
                statistics=page.statistics_view(cache) if measure else None,
                output=self.output,
                scratch=scratch,
                plan=plan,
                scale=self.scale,
            )
            for cache in self.caches(
                block_size, token_major=token_major, has_statistics=True
            )
        ]

    def prefill_mass(self, plan: PrefillPlan, block_size: int = 16) -> list[Call]:
        """Return our prompt kernel's calls, one a layer; arguments as of `roco`."""
        shape, table = self.shape, self.table(block_size)
        scratch = PrefillScratch.allocate(self.pool.device)
        # any log-sum-exp will do for timing: weights above 1 cost what others do
        lse = torch.full(
            (shape.q_heads, shape.batch * shape.query_len),
            math.log(shape.context),
            device=self.pool.device,
        )
        return [
            partial(
                measure_prefill,
                query=self.query,
                kv_cache=cache,
                lse=lse,
                query_start_loc=self.query_starts,
                live_table=table,
                live_lens=self.lengths,
                evicted_before=self.evicted,
                statistics=page.statistics_view(cache),
                max_live_tokens=shape.context,
                plan=plan,
                scratch=scratch,
                scale=self.scale,
            )
            for cache in self.caches(block_size, token_major=False, has_statistics=True)
        ]

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
        common: dict[str, Any] = {
            "max_seqlen_q": shape.query_len,
            "max_seqlen_k": shape.context,
            "cu_seqlens_q": self.query_starts,
            "causal": True,
            "num_splits": max_splits,
        }
        # worked out once a step, for all layers, so it is no part of a layer's time
        metadata = get_scheduler_metadata(
            batch_size=shape.batch,
            num_heads_q=shape.q_heads,
            num_heads_kv=shape.kv_heads,
            headdim=shape.head_size,
            cache_seqlens=self.lengths,
            qkv_dtype=DTYPE,
            page_size=block_size,
            **common,
        )
        table = self.table(block_size)
        states = (
            cache.transpose(1, 2).split(shape.head_size, -1)
            for cache in self.caches(
                block_size, token_major=token_major, has_statistics=False
            )
        )
        return [
            partial(
                flash_attn_varlen_func,
                q=self.query,
                k=keys,
                v=values,
                seqused_k=self.lengths,
                softmax_scale=self.scale,
                block_table=table,
                out=self.output,
                scheduler_metadata=metadata,
                fa_version=3,
                **common,
            )
            for keys, values in states
        ]

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
            kv_seqlen=shape.lengths,
            kv_padding=table.shape[1] * block_size,
            device=self.pool.device,
        ).make_paged(
            block_tables=table,
            page_size=block_size,
            paged_type=PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
        )
        group = shape.q_heads // shape.kv_heads
        heads = (1, -1, shape.kv_heads, group, shape.head_size)
        half = table.numel() * block_size * shape.kv_heads * shape.head_size
        return [
            partial(
                fmha.memory_efficient_attention_forward,
                self.query.view(heads),
                # keys and values of their own: it takes no interleaved ones
                *(
                    states.view(1, -1, shape.kv_heads, 1, shape.head_size).expand(heads)
                    for states in memory[: 2 * half].chunk(2)
                ),
                attn_bias=bias,
                op=fmha.triton_splitk.FwOp,
            )
            for memory in self.pool.split(shape.layer_numel)
        ]

    def check(
        self,
        plan: DecodePlan,
        *,
        block_size: int,
        token_major: bool,
        measure: bool = True,
        kernel: Callable[..., object] | None = None,
    ) -> None:
        """Raise unless the first layer's output and masses are as they should be.

        Rows at both ends and in the middle are compared with float32; bfloat16 products
        of the same reference tell what error to expect.

        Args:
            plan: Layout of the launch.
            block_size: Tokens per page.
            token_major: Whether the page is `[token, head]`.
            measure: Whether statistics are kept.
            kernel: As of `calls`; ours if None.
        """
        # masses that stood in pages of another size would be keys that are no numbers
        self.pool.normal_()
        if self.shape.fp8:
            # of every size below 2
            self.pool.view(torch.uint8).random_().bitwise_and_(0xBF)
        table = self.table(block_size)
        pages: dict[str, Any] = {"block_size": block_size, "token_major": token_major}
        cache = next(self.caches(**pages, has_statistics=True))
        how: dict[str, Any] = {**pages, "measure": measure, "table": table}
        calls = self.calls(kernel, plan, **how) if kernel else self.roco(plan, **how)
        self.output.fill_(float("nan"))
        calls[0]()
        statistics = page.statistics_view(cache)
        if not self.output.isfinite().all():
            raise AssertionError(f"{self.shape}: {plan} leaves NaN in the output")
        states = cache
        if self.kv_scale is not None:
            states = fp8_cache.states_from_bytes(cache, self.kv_scale, self.kv_scale)
        for row in sorted({0, self.shape.batch // 2, self.shape.batch - 1}):
            exact, low = (
                reference.attend(
                    query=self.query[row : row + 1],
                    kv_cache=states,
                    blocks=table[row],
                    live_len=self.shape.lengths[row],
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
            if not measure:
                continue
            masses = statistics[table[row].long(), :, page.MASS_SUM]
            torch.testing.assert_close(masses, exact.mass[0].T, rtol=1e-3, atol=1e-6)
