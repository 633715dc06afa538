# SPDX-License-Identifier: Apache-2.0
"""Attention over a bounded KV cache on CUDA.

Decode rows go through a kernel that attends and measures in one pass. Prompt rows go
through vLLM's FlashAttention over the live table, then through a kernel that adds up
what the blocks received. The last layer of a group evicts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from typing_extensions import override
from vllm.v1.attention.backends.fa_utils import (
    flash_attn_varlen_func,
    get_flash_attn_version,
    reshape_and_cache_flash,
)

from vllm_roco.attention.bound_caches import CacheViews
from vllm_roco.attention.cuda.metadata import Decodes, Prefills, RocoCudaMetadata
from vllm_roco.attention.cuda.step_memory import StepMemory, reserve
from vllm_roco.attention.impl import RocoImpl
from vllm_roco.attention.layers import name_of
from vllm_roco.ops.decode.attention import decode_attention
from vllm_roco.ops.decode.plan import DecodeScratch
from vllm_roco.ops.device import Device
from vllm_roco.ops.prefill_attention import prefill_attention
from vllm_roco.ops.prefill_mass import measure_prefill

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer


class RocoCudaImpl(RocoImpl[RocoCudaMetadata]):
    """One layer's attention by kernels; see `RocoImpl`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.head_size % 8 or not 16 <= self.head_size <= 256:
            raise NotImplementedError(
                f"roco: head_size = {self.head_size} is not supported on CUDA. Serve a "
                "model whose heads have 16 to 256 numbers, a multiple of 8, or use "
                "another --attention-backend."
            )
        # None where FlashAttention does not run: our own kernel attends then
        self.flash_version: int | None = None
        dtype = cast("torch.dtype", self.vllm_config.model_config.dtype)
        if dtype in (torch.float16, torch.bfloat16):
            self.flash_version = get_flash_attn_version(head_size=self.head_size)
        self.hardware = Device.of(torch.device("cuda", torch.cuda.current_device()))
        self.memory: StepMemory | None = None

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the step's keys and values into their slots.

        Args:
            layer: The vLLM layer.
            key: `[num_tokens, num_kv_heads, head_size]`, perhaps padded.
            value: Likewise.
            kv_cache: As vLLM binds it, see `PageShape.states_view`.
            slot_mapping: `[num_tokens]` int64, -1 for padding.
        """
        views = self.views.of(kv_cache)
        reshape_and_cache_flash(
            key,
            value,
            views.keys,
            views.values,
            slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )

    @override
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: RocoCudaMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over the live blocks, measure, and in the last layer evict.

        Args:
            layer: The vLLM layer.
            query: `[num_tokens, num_heads, head_size]`.
            key: Already in the cache, see `do_kv_cache_update`.
            value: Likewise.
            kv_cache: As vLLM binds it, see `PageShape.states_view`.
            attn_metadata: The step, or None in profiling runs, in which nothing is
                attended but the memory of steps is taken.
            output: `[num_tokens, num_heads, head_size]`, written in place.
            output_scale: Must be None: quantised outputs are not announced.
            output_block_scale: Likewise.
        """
        if attn_metadata is None:
            if self.memory is None:
                reserve(self.vllm_config, output.device, self.hardware)
            return output.fill_(0)
        views = self.views.of(kv_cache)
        decodes, prefills = attn_metadata.decodes, attn_metadata.prefills
        if decodes is not None:
            self._decode(query, views, output, decodes, attn_metadata.scratch)
        if prefills is not None:
            self._prefill(query, views, output, prefills)
        if name_of(layer) == attn_metadata.eviction.last_layer:
            attn_metadata.eviction.evict(attn_metadata.step, attn_metadata.seq_lens)
        return output

    def _decode(
        self,
        query: torch.Tensor,
        views: CacheViews,
        output: torch.Tensor,
        decodes: Decodes,
        scratch: DecodeScratch,
    ) -> None:
        step = decodes.step
        decode_attention(
            query=query[: decodes.num_rows],
            kv_cache=views.states,
            live_table=step.live_table,
            live_lens=step.live_lens,
            evicted_before=step.evicted_before,
            statistics=views.statistics,
            output=output[: decodes.num_rows],
            scratch=scratch,
            plan=decodes.plan,
            scale=self.scale,
            soft_cap=self.soft_cap,
        )

    def _prefill(
        self,
        query: torch.Tensor,
        views: CacheViews,
        output: torch.Tensor,
        prefills: Prefills,
    ) -> None:
        tokens = slice(prefills.first_token, prefills.first_token + prefills.num_tokens)
        query, output = query[tokens], output[tokens]
        step = prefills.step
        if self.flash_version is not None:
            lse = self._flash(query, views, output, prefills, self.flash_version)
        else:
            lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
            prefill_attention(
                query=query,
                kv_cache=views.states,
                query_start_loc=prefills.query_start_loc,
                live_table=step.live_table,
                live_lens=step.live_lens,
                output=output,
                lse=lse,
                max_query_len=prefills.max_query_len,
                scale=self.scale,
                soft_cap=self.soft_cap,
            )
        if views.statistics is not None:
            measure_prefill(
                query=query,
                kv_cache=views.states,
                lse=lse,
                query_start_loc=prefills.query_start_loc,
                live_table=step.live_table,
                live_lens=step.live_lens,
                evicted_before=step.evicted_before,
                statistics=views.statistics,
                max_live_tokens=prefills.max_live_tokens,
                plan=prefills.plan,
                scale=self.scale,
                soft_cap=self.soft_cap,
            )

    def _flash(
        self,
        query: torch.Tensor,
        views: CacheViews,
        output: torch.Tensor,
        prefills: Prefills,
        version: int,
    ) -> torch.Tensor:
        lse: torch.Tensor
        _, lse = flash_attn_varlen_func(
            q=query,
            k=views.keys,
            v=views.values,
            out=output,
            cu_seqlens_q=prefills.query_start_loc,
            max_seqlen_q=prefills.max_query_len,
            seqused_k=prefills.step.live_lens,
            max_seqlen_k=prefills.max_live_tokens,
            softmax_scale=self.scale,
            causal=True,
            block_table=prefills.step.live_table,
            softcap=self.soft_cap,
            return_softmax_lse=True,
            fa_version=version,
        )
        return lse
