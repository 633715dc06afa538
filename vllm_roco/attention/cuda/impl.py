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
from vllm_roco.attention.cuda.sinks import add_sinks, flash_has_sinks
from vllm_roco.attention.cuda.step_memory import StepMemory, reserve
from vllm_roco.attention.impl import RocoImpl
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
            self.flash_version = get_flash_attn_version(
                head_size=self.head_size, has_sinks=self.sinks is not None
            )
        self.hardware = Device.of(torch.device("cuda", torch.cuda.current_device()))
        self.memory: StepMemory | None = None

    @override
    def _write(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        views: CacheViews,
        slot_mapping: torch.Tensor,
    ) -> None:
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
    def _profile(self, device: torch.device) -> None:
        if self.memory is None:
            reserve(self.vllm_config, device, self.hardware)

    @override
    def _step(
        self,
        layer_name: str,
        query: torch.Tensor,
        views: CacheViews,
        step: RocoCudaMetadata,
        output: torch.Tensor,
    ) -> None:
        if step.decodes is not None:
            self._decode(query, views, output, step.decodes, step.scratch)
        if step.prefills is not None:
            self._prefill(query, views, output, step.prefills)
        if layer_name == step.eviction.last_layer:
            step.eviction.evict(step.step, step.seq_lens)

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
            measured_lens=step.measured_lens,
            evicted_before=step.evicted_before,
            statistics=views.statistics,
            output=output[: decodes.num_rows],
            scratch=scratch,
            plan=decodes.plan,
            scale=self.scale,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
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
                sinks=self.sinks,
            )
        if views.statistics is not None:
            measure_prefill(
                query=query,
                kv_cache=views.states,
                lse=lse,
                query_start_loc=prefills.query_start_loc,
                live_table=step.live_table,
                live_lens=step.measured_lens,
                evicted_before=step.evicted_before,
                statistics=views.statistics,
                max_live_tokens=prefills.max_measured_tokens,
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
        sinks = self.sinks
        in_flash = sinks is not None and flash_has_sinks(version, sinks.dtype)
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
            s_aux=sinks if in_flash else None,
        )
        return lse if sinks is None or in_flash else add_sinks(output, lse, sinks)
