# SPDX-License-Identifier: Apache-2.0
"""What one step means for RoCo's layers on CUDA, in buffers that never move.

A captured graph replays the addresses it was captured with, so everything that changes
from step to step lies in memory that is allocated once, and everything that a graph has
frozen (grids, layouts) depends on the number of rows alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

import torch
from typing_extensions import override
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_roco.attention.cuda.eviction import CudaEviction, EvictionScratch
from vllm_roco.attention.cuda.step_bounds import StepBounds
from vllm_roco.attention.cuda.step_buffers import StepBuffers
from vllm_roco.attention.cuda.step_memory import HasStepMemory, claim
from vllm_roco.attention.cuda.uploaded_rows import UploadedRows
from vllm_roco.attention.layers import LayerGroup, roco_spec
from vllm_roco.attention.moved_blocks import DeviceMovedBlocks, moved_blocks_of
from vllm_roco.attention.request_rows import request_rows
from vllm_roco.attention.tensor_ranks import tensor_ranks
from vllm_roco.ops.decode.attention import DecodeLaunch
from vllm_roco.ops.decode.plan import DecodePlan, DecodeScratch
from vllm_roco.ops.decode.splits import DecodeSplits
from vllm_roco.ops.device import Device
from vllm_roco.ops.prefill_mass import PrefillMassLaunch
from vllm_roco.ops.prefill_plan import PrefillPlan, PrefillScratch, plan_prefill
from vllm_roco.validation import validated_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

IDLE_TOKENS = 2
"""Tokens of an idle step: the fewest that make a prompt."""


@dataclass(frozen=True)
class Decodes:
    """The rows with one query each; they come first in the batch.

    Attributes:
        num_rows: Their number, padding included.
        step: Their rows of the step's buffers.
        plan: How the kernels are laid out for so many rows.
        splits: Which program attends over what.
        launches: How the step's first layer of a kind attended, for the others.
    """

    num_rows: int
    step: StepBuffers
    plan: DecodePlan
    splits: DecodeSplits
    launches: dict[object, DecodeLaunch] = field(default_factory=dict)


@dataclass(frozen=True)
class Prefills:
    """The rows with several queries, behind the decodes.

    Attributes:
        first_token: Index of their first query among the step's tokens.
        num_tokens: Their queries.
        step: Their rows of the step's buffers.
        query_start_loc: `[num_rows + 1]` int32, counted from `first_token`.
        max_query_len: Their longest query.
        max_live_tokens: Bound of the tokens attended.
        max_measured_tokens: The same for rows that are measured.
        plan: How the kernel that measures them is laid out.
        scratch: What its programs leave for each other.
        launches: How the step's first layer of a kind measured, for the others.
        schedules: How FlashAttention lays out the step, by kind of layer.
    """

    first_token: int
    num_tokens: int
    step: StepBuffers
    query_start_loc: torch.Tensor
    max_query_len: int
    max_live_tokens: int
    max_measured_tokens: int
    plan: PrefillPlan
    scratch: PrefillScratch
    launches: dict[object, PrefillMassLaunch] = field(default_factory=dict)
    schedules: dict[object, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RocoCudaMetadata(AttentionMetadata):
    """One step of one KV cache group.

    Attributes:
        decodes: The rows with one query, or None.
        prefills: The rows with more, or None.
        scratch: Memory that the decode kernels share.
        seq_lens: `[num_rows]` int32, length of each row after the step.
        step: The step's buffers, all rows.
        eviction: What the last layer evicts with.
    """

    decodes: Decodes | None
    prefills: Prefills | None
    scratch: DecodeScratch
    seq_lens: torch.Tensor
    step: StepBuffers
    eviction: CudaEviction


class HasBuilder(Protocol):
    """A layer's implementation, as far as it knows who builds its steps."""

    builder: weakref.ref[RocoCudaMetadataBuilder] | None


class RocoCudaMetadataBuilder(AttentionMetadataBuilder[RocoCudaMetadata]):
    """Builds the step's metadata with two kernels; arguments as in the base class."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        spec = roco_spec(kv_cache_spec)
        layers = LayerGroup(layer_names, vllm_config)
        config = validated_config(vllm_config)
        self._block_size = spec.block_size
        self._num_q_heads, self._num_kv_heads = layers.num_heads, spec.num_kv_heads
        # of prompts, before a step's own tokens
        self._max_kept_tokens = config.max_budget + config.stride - 1
        self._allow_full = config.allow_full
        bounds = StepBounds.of(
            spec,
            vllm_config,
            num_q_heads=layers.num_heads,
            num_layers=len(layers),
        )
        hardware = Device.of(device)
        self._buffers, scratch, self._prefill_scratch = claim(
            cast("list[HasStepMemory]", layers.implementations),
            bounds,
            device,
            hardware,
        )
        self._request_rows = request_rows(vllm_config, spec.block_size)
        self._uploaded_rows = UploadedRows(
            self._buffers.eviction_rows, self._request_rows.default
        )
        self._prefill_plan = plan_prefill(
            head_size=spec.head_size,
            block_size=spec.block_size,
            dtype=cast("torch.dtype", vllm_config.model_config.dtype),
            device=hardware,
        )
        self._plans = [
            bounds.decode_plan(rows, hardware) for rows in range(1, bounds.rows + 1)
        ]
        # some KiB, which are not in the planned memory
        self._splits = DecodeSplits.allocate(
            enumerate(self._plans, 1), spec.num_kv_heads, device
        )
        self._scratch = DecodeScratch.over(scratch, bounds.decode_scratch(hardware))
        self._eviction = CudaEviction(
            layers,
            spec,
            # attention is done with the scratch when eviction begins
            EvictionScratch.over(scratch, bounds.eviction_scratch),
            tensor_ranks(vllm_config, config),
            bounds.evicting_decode_blocks,
        )
        self._moved_blocks: DeviceMovedBlocks | None = None
        if (moved_blocks := moved_blocks_of(vllm_config)) is not None:
            self._moved_blocks = DeviceMovedBlocks(
                self._eviction.moved, moved_blocks, torch.cuda.Event()
            )
        for implementation in cast("list[HasBuilder]", layers.implementations):
            implementation.builder = weakref.ref(self)

    @override
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> RocoCudaMetadata:
        """Work out the live tables and `E` on the device, without a host read."""
        if self._moved_blocks is not None:
            self._moved_blocks.poll()
        common = common_attn_metadata
        self._uploaded_rows.set(self._request_rows.of_step(common))
        num_rows = common.num_reqs
        step = self._buffers.rows(0, num_rows)
        step.fill(
            common.block_table_tensor,
            common.seq_lens,
            common.query_start_loc,
            self._block_size,
        )
        num_decodes, num_prefills, num_decode_tokens, num_prefill_tokens = (
            split_decodes_and_prefills(common)
        )
        decodes = prefills = None
        if num_decodes:
            decodes = Decodes(
                num_rows=num_decodes,
                step=step.rows(0, num_decodes),
                plan=self._plans[num_decodes - 1],
                splits=self._splits,
            )
            self._splits.deal(decodes.step.live_lens, decodes.plan)
        if num_prefills:
            start = common.query_start_loc[num_decodes : num_rows + 1]
            longest = self._max_kept_tokens + common.max_query_len
            measured = min(common.max_seq_len, longest)
            prefills = Prefills(
                first_token=num_decode_tokens,
                num_tokens=num_prefill_tokens,
                step=step.rows(num_decodes, num_rows),
                query_start_loc=start - num_decode_tokens if num_decodes else start,
                max_query_len=common.max_query_len,
                max_live_tokens=common.max_seq_len if self._allow_full else measured,
                max_measured_tokens=measured,
                plan=self._prefill_plan.for_step(
                    num_rows=num_prefills,
                    num_q_heads=self._num_q_heads,
                    num_kv_heads=self._num_kv_heads,
                    block_size=self._block_size,
                    max_query_len=common.max_query_len,
                    max_live_tokens=measured,
                ),
                scratch=self._prefill_scratch,
            )
        return RocoCudaMetadata(
            decodes=decodes,
            prefills=prefills,
            scratch=self._scratch,
            seq_lens=common.seq_lens,
            step=step,
            eviction=self._eviction,
        )

    def idle_steps(self) -> Iterator[RocoCudaMetadata]:
        """Yield steps that together launch every variant of the kernels of a layer.

        One row of `IDLE_TOKENS` tokens in vLLM's null block, of which nothing is
        measured and nothing evicted, so that caches are left as they are. It is that
        of a prompt first, and then that of a decode in each layout. The buffers are
        none of the steps that are served.
        """
        served = self._buffers
        step = StepBuffers.allocate(1, served.live_table.shape[1], self.device)
        step.eviction_rows.copy_(served.eviction_rows[:1])

        def int32(*numbers: int) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=self.device)

        seq_lens, query_start_loc = int32(IDLE_TOKENS), int32(0, IDLE_TOKENS)
        step.fill(int32(0)[None], seq_lens, query_start_loc, self._block_size)
        step.measured_lens.zero_()
        prefills = Prefills(
            first_token=0,
            num_tokens=IDLE_TOKENS,
            step=step,
            query_start_loc=query_start_loc,
            max_query_len=IDLE_TOKENS,
            max_live_tokens=IDLE_TOKENS,
            max_measured_tokens=IDLE_TOKENS,
            plan=self._prefill_plan,
            scratch=self._prefill_scratch,
        )
        # how many shares there are changes nothing in the kernels
        plans = [*dict.fromkeys(replace(plan, shares=1) for plan in self._plans)]
        splits = DecodeSplits.allocate(
            ((1, plan) for plan in plans), self._num_kv_heads, self.device
        )
        for plan in (None, *plans):
            if plan is not None:
                splits.deal(step.live_lens, plan)
            yield RocoCudaMetadata(
                decodes=None if plan is None else Decodes(1, step, plan, splits),
                prefills=prefills if plan is None else None,
                scratch=self._scratch,
                seq_lens=seq_lens,
                step=step,
                eviction=self._eviction,
            )
