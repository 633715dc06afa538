# SPDX-License-Identifier: Apache-2.0
"""Attention over a bounded KV cache on CUDA.

Decode rows go through a kernel that attends and measures in one pass. Prompt rows go
through vLLM's FlashAttention over the live table, then through a kernel that adds up
what the blocks received. The last layer of a group evicts.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from typing_extensions import override
from vllm._custom_ops import scaled_fp8_quant
from vllm.v1.attention.backends.fa_utils import (
    flash_attn_varlen_func,
    get_flash_attn_version,
    get_scheduler_metadata,
    reshape_and_cache_flash,
)

from vllm_roco.attention.bound_caches import CacheViews
from vllm_roco.attention.cuda.flash_windows import FullAttention
from vllm_roco.attention.cuda.metadata import (
    Decodes,
    Prefills,
    RocoCudaMetadata,
    RocoCudaMetadataBuilder,
)
from vllm_roco.attention.cuda.prompt_sinks import add_sinks, flash_has_sinks
from vllm_roco.attention.cuda.prompt_tensors import (
    PromptTensors,
    empty_bfloat16,
    empty_fp8,
    empty_lse,
)
from vllm_roco.attention.cuda.step_memory import StepMemory, reserve
from vllm_roco.attention.cuda.warmup import KERNEL_WARM_UP
from vllm_roco.attention.impl import RocoImpl
from vllm_roco.attention.layers import name_of, refuse_head_size
from vllm_roco.ops.decode.attention import decode_attention
from vllm_roco.ops.decode.plan import DecodeScratch
from vllm_roco.ops.device import Device
from vllm_roco.ops.launch import alike
from vllm_roco.ops.prefill_attention import prefill_attention
from vllm_roco.ops.prefill_mass import measure_prefill

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionImplBase, AttentionLayer


class RocoCudaImpl(RocoImpl[RocoCudaMetadata]):
    """One layer's attention by kernels; see `RocoImpl`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_head_size(self.head_size)
        self.flash_version = self._flash_version()
        self.hardware = Device.of(torch.device("cuda", torch.cuda.current_device()))
        # what layers of one group may differ in, beside their tensors
        self._kind = self.num_heads, self.scale, self.soft_cap
        self.memory: StepMemory | None = None
        self.builder: weakref.ref[RocoCudaMetadataBuilder] | None = None
        KERNEL_WARM_UP.register_warmup()

    @override
    def get_impl_variants(self) -> tuple[AttentionImplBase[Any], ...]:
        """Return itself, and how the builder of layers with a window counts it."""
        return self, FullAttention()

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
    def _profile(self, query: torch.Tensor) -> None:
        if self.memory is None:
            reserve(self.vllm_config, query.device, self.hardware)
        in_fp8 = self.is_fp8 and self.flash_version is not None
        PromptTensors(
            quantises_queries=in_fp8,
            converts_output=in_fp8 and query.dtype != torch.bfloat16,
            adds_sinks=self._adds_sinks,
        ).rehearse(query)

    @override
    def _step(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        views: CacheViews,
        step: RocoCudaMetadata,
        output: torch.Tensor,
    ) -> None:
        if step.decodes is not None:
            self._decode(layer, query, views, output, step.decodes, step.scratch)
        if step.prefills is not None:
            self._prefill(layer, query, views, output, step.prefills)
        if name_of(layer) == step.eviction.last_layer:
            step.eviction.evict(
                step.step, step.seq_lens, has_prompts=step.prefills is not None
            )

    def _decode(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        views: CacheViews,
        output: torch.Tensor,
        decodes: Decodes,
        scratch: DecodeScratch,
    ) -> None:
        rows = slice(decodes.num_rows)
        k_scale, v_scale = self._scales(layer)
        of_layer = (
            *(query[rows], views.states, views.statistics, output[rows]),
            *(self.sinks, k_scale, v_scale),
        )
        kind = (*self._kind, alike(*of_layer))
        if (launch := decodes.launches.get(kind)) is not None:
            launch.again(*of_layer)
            return
        step = decodes.step
        decodes.launches[kind] = decode_attention(
            query=query[rows],
            kv_cache=views.states,
            live_table=step.live_table,
            live_lens=step.live_lens,
            splits=decodes.splits,
            measured_lens=step.measured_lens,
            evicted_before=step.evicted_before,
            statistics=views.statistics,
            output=output[rows],
            scratch=scratch,
            plan=decodes.plan,
            scale=self.scale,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    def _prefill(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        views: CacheViews,
        output: torch.Tensor,
        prefills: Prefills,
    ) -> None:
        tokens = slice(prefills.first_token, prefills.first_token + prefills.num_tokens)
        query, output = query[tokens], output[tokens]
        step = prefills.step
        k_scale, v_scale = self._scales(layer)
        if self.flash_version is not None:
            lse = self._flash(layer, query, views, output, prefills, self.flash_version)
        else:
            lse = empty_lse(query)
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
                k_scale=k_scale,
                v_scale=v_scale,
            )
        if views.statistics is not None:
            self._measure(query, views.states, lse, views.statistics, k_scale, prefills)

    def _measure(
        self,
        query: torch.Tensor,
        states: torch.Tensor,
        lse: torch.Tensor,
        statistics: torch.Tensor,
        k_scale: torch.Tensor | None,
        prefills: Prefills,
    ) -> None:
        of_layer = (query, states, lse, statistics, k_scale)
        kind = (*self._kind, alike(*of_layer))
        if (launch := prefills.launches.get(kind)) is not None:
            launch.again(*of_layer)
            return
        step = prefills.step
        prefills.launches[kind] = measure_prefill(
            query=query,
            kv_cache=states,
            lse=lse,
            query_start_loc=prefills.query_start_loc,
            live_table=step.live_table,
            live_lens=step.measured_lens,
            evicted_before=step.evicted_before,
            statistics=statistics,
            max_live_tokens=prefills.max_measured_tokens,
            plan=prefills.plan,
            scratch=prefills.scratch,
            scale=self.scale,
            soft_cap=self.soft_cap,
            k_scale=k_scale,
        )

    def _flash(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        views: CacheViews,
        output: torch.Tensor,
        prefills: Prefills,
        version: int,
    ) -> torch.Tensor:
        keys, values, written = views.keys, views.values, output
        q_descale = k_descale = v_descale = None
        if self.is_fp8:
            keys, values = (x.view(torch.float8_e4m3fn) for x in (keys, values))
            query = self._quantised(layer, query)
            by_row_and_head = len(prefills.step.live_lens), self.num_kv_heads
            q_descale = layer._q_scale.expand(by_row_and_head)
            k_descale = layer._k_scale.expand(by_row_and_head)
            v_descale = layer._v_scale.expand(by_row_and_head)
            if output.dtype != torch.bfloat16:
                # of an fp8 query it writes nothing else
                written = empty_bfloat16(output)
        lse: torch.Tensor
        _, lse = flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=written,
            cu_seqlens_q=prefills.query_start_loc,
            max_seqlen_q=prefills.max_query_len,
            seqused_k=prefills.step.live_lens,
            max_seqlen_k=prefills.max_live_tokens,
            softmax_scale=self.scale,
            causal=True,
            block_table=prefills.step.live_table,
            softcap=self.soft_cap,
            return_softmax_lse=True,
            scheduler_metadata=self._schedule(
                prefills, query.dtype, keys.shape[1], version
            ),
            fa_version=version,
            s_aux=None if self._adds_sinks else self.sinks,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
        )
        if written is not output:
            output.copy_(written)
        if self.sinks is None or not self._adds_sinks:
            return lse
        return add_sinks(output, lse, self.sinks)

    def _schedule(
        self, prefills: Prefills, dtype: torch.dtype, block_size: int, version: int
    ) -> torch.Tensor | None:
        """Return what FlashAttention 3 else works out anew in every layer."""
        if version != 3:
            return None
        kind = (self.num_heads, self.soft_cap != 0.0, dtype)
        if (schedule := prefills.schedules.get(kind)) is None:
            schedule = prefills.schedules[kind] = get_scheduler_metadata(
                batch_size=len(prefills.step.live_lens),
                max_seqlen_q=prefills.max_query_len,
                max_seqlen_k=prefills.max_live_tokens,
                num_heads_q=self.num_heads,
                num_heads_kv=self.num_kv_heads,
                headdim=self.head_size,
                cache_seqlens=prefills.step.live_lens,
                qkv_dtype=dtype,
                cu_seqlens_q=prefills.query_start_loc,
                page_size=block_size,
                causal=True,
                has_softcap=self.soft_cap != 0.0,
            )
        return schedule

    @property
    def _adds_sinks(self) -> bool:
        """Whether the model's sinks are added behind FlashAttention."""
        if self.sinks is None or self.flash_version is None:
            return False
        # in FlashAttention they are not tried together with an fp8 cache
        return self.is_fp8 or not flash_has_sinks(self.flash_version, self.sinks.dtype)

    def _flash_version(self) -> int | None:
        """Return which FlashAttention attends; None where our own kernel does."""
        dtype = cast("torch.dtype", self.vllm_config.model_config.dtype)
        if dtype not in (torch.float16, torch.bfloat16):
            return None
        version: int | None = get_flash_attn_version(
            head_size=self.head_size, has_sinks=self.sinks is not None
        )
        if self.is_fp8 and (version != 3 or self.head_size % 16):
            return None
        return version

    def _quantised(self, layer: AttentionLayer, query: torch.Tensor) -> torch.Tensor:
        """Return queries as FlashAttention multiplies them with an fp8 cache."""
        columns = -1
        if layer._q_scale.numel() > 1:
            columns = self.num_heads // self.num_kv_heads * self.head_size
        quantised = empty_fp8(query)
        scaled_fp8_quant(
            query.flatten(1),
            layer._q_scale,
            output=quantised.flatten(1),
            group_shape=(-1, columns),
        )
        return quantised
