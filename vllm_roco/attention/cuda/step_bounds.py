# SPDX-License-Identifier: Apache-2.0
"""How large the steps of a group of layers can be, and the memory that they take.

Arithmetic alone: vLLM profiles its memory before it makes caches and metadata builders,
and what steps need must be known, and taken, by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_roco.attention.cuda.eviction import EvictionScratchSize
from vllm_roco.attention.cuda.step_buffers import StepBuffers
from vllm_roco.attention.tensor_ranks import num_agreeing_ranks
from vllm_roco.config import blocks_of
from vllm_roco.ops.decode.plan import DecodePlan, DecodeScratchSize, plan_decode
from vllm_roco.ops.prefill_plan import PrefillScratch
from vllm_roco.validation import validated_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_roco.kv_cache.spec import RocoSpec
    from vllm_roco.ops.device import Device


@dataclass(frozen=True, kw_only=True)
class StepBounds:
    """The largest step of a group of layers.

    Attributes:
        rows: Most rows, padding included.
        live_tokens: Most tokens that a row attends over.
        evicting_tokens: Most that a row attends over from which blocks may go.
        measured_tokens: Most that a row with one query attends over and measures.
        decode_tokens: Most that a row with one query attends over whose request brings
            no options.
        block_size: Tokens per block.
        resident_blocks: Most resident blocks of a row that evicts.
        measures: Whether statistics are kept.
        num_layers: Layers of the group.
        num_q_heads: Query heads of a layer on this rank.
        num_kv_heads: KV heads of a layer on this rank.
        head_size: Numbers per head.
        dtype: Element type of the cache; of the query where that is float32.
        agreeing_ranks: Ranks that choose together.
    """

    rows: int
    live_tokens: int
    evicting_tokens: int
    measured_tokens: int
    decode_tokens: int
    block_size: int
    resident_blocks: int
    measures: bool
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    agreeing_ranks: int = 1

    @classmethod
    def of(
        cls,
        spec: RocoSpec,
        vllm_config: VllmConfig,
        *,
        num_q_heads: int,
        num_layers: int,
    ) -> StepBounds:
        """Return the bounds that the configuration sets.

        Args:
            spec: The KV cache spec of the layers.
            vllm_config: The worker's configuration.
            num_q_heads: Query heads of a layer on this rank.
            num_layers: Layers of the group.
        """
        scheduler = vllm_config.scheduler_config
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        max_model_len = vllm_config.model_config.max_model_len
        model_dtype = vllm_config.model_config.dtype
        config = validated_config(vllm_config)
        # what a step leaves of a request with the largest budget of its own
        after_a_step = config.max_budget + config.stride - 1
        decoding = max_model_len
        if config.most_kept is not None:
            # a decode starts from what a step leaves and adds one token
            decoding = min(max_model_len, config.most_kept + config.stride)
        # the warm-up does not go through the scheduler, so a chunk is no bound here
        evicting = min(max_model_len, after_a_step + scheduler.max_num_batched_tokens)
        return cls(
            rows=max(scheduler.max_num_seqs, captured),
            live_tokens=max_model_len if config.allow_full else evicting,
            evicting_tokens=evicting,
            measured_tokens=min(max_model_len, after_a_step + 1),
            decode_tokens=decoding,
            block_size=spec.block_size,
            resident_blocks=blocks_of(
                min(max_model_len, config.max_budget), spec.block_size
            ),
            measures=spec.has_statistics,
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            dtype=torch.float32 if model_dtype == torch.float32 else spec.dtype,
            agreeing_ranks=num_agreeing_ranks(vllm_config, config),
        )

    @property
    def live_blocks(self) -> int:
        """Most live blocks of a row."""
        return blocks_of(self.live_tokens, self.block_size)

    @property
    def evicting_decode_blocks(self) -> int:
        """Most live blocks of a row with one query from which blocks may go."""
        return blocks_of(self.measured_tokens, self.block_size)

    def decode_plan(self, num_rows: int, device: Device) -> DecodePlan:
        """Return how decode attention of so many rows is laid out."""
        return plan_decode(
            num_rows=num_rows,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            max_live_tokens=self.decode_tokens,
            dtype=self.dtype,
            device=device,
        )

    def decode_scratch(self, device: Device) -> DecodeScratchSize:
        """Return what decode attention leaves from one kernel to the next."""
        return DecodeScratchSize.of(
            plans=[
                (rows, self.decode_plan(rows, device))
                for rows in range(1, self.rows + 1)
            ],
            num_q_heads=self.num_q_heads,
            head_size=self.head_size,
            block_size=self.block_size,
            max_live_tokens=self.measured_tokens,
            measure=self.measures,
        )

    @property
    def eviction_scratch(self) -> EvictionScratchSize:
        """What eviction leaves from one kernel to the next."""
        return EvictionScratchSize.of(
            rows=self.rows,
            live_blocks=blocks_of(self.evicting_tokens, self.block_size),
            resident_blocks=self.resident_blocks,
            num_layers=self.num_layers,
            measure=self.measures,
            ranks=self.agreeing_ranks,
        )

    def scratch_numbers(self, device: Device) -> int:
        """Return the float32 numbers that kernels leave for the next ones.

        Decode attention is done with its own when eviction begins.
        """
        return max(self.decode_scratch(device).total, self.eviction_scratch.total)

    def memory_bytes(self, device: Device) -> int:
        """Return the bytes on the device that the steps of a group take.

        Args:
            device: What the kernels are laid out for.
        """
        scratch = self.scratch_numbers(device) * torch.float32.itemsize
        buffers = StepBuffers.num_bytes(self.rows, self.live_blocks)
        return buffers + scratch + PrefillScratch.num_bytes()
