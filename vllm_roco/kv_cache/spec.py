# SPDX-License-Identifier: Apache-2.0
"""What vLLM plans memory with: the page of a RoCo layer and the most it can need."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import (
    _REGISTRY_KVCACHESPEC_LIST,
    register_kv_cache_spec,
)

from vllm_roco.chunking import ChunkEnds
from vllm_roco.config import RocoConfig, check_whole_blocks
from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.kv_cache.manager import RocoManager
from vllm_roco.kv_cache.page import PageShape
from vllm_roco.kv_cache.too_small import too_small
from vllm_roco.request_plans import ResolvedPlan, most_blocks_by_default
from vllm_roco.scheduler_choice import use_roco_scheduler

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

logger = init_logger(f"vllm.{__name__}")

if not _REGISTRY_KVCACHESPEC_LIST:
    # vLLM registers its own specs only while nothing at all is registered
    register_all_kvcache_specs(None)


@register_kv_cache_spec(manager_class=RocoManager)
@dataclass(frozen=True, kw_only=True)
class RocoSpec(AttentionSpec):
    """The KV cache of a layer that keeps at most a budget of tokens per sequence.

    Not a `FullAttentionSpec`, so that vLLM never puts RoCo and ordinary layers into one
    group. vLLM may change `block_size` of a model with several kinds of layers, so
    everything is kept in tokens and the page is sized anew on every copy.

    To vLLM a page is one head with one state, whatever lies in it: see `page`.

    Raises:
        ValueError: Budget, stride or chunk is no multiple of the block size, as when
            vLLM has enlarged the blocks.

    Attributes:
        budget: Tokens kept per sequence.
        stride: Tokens evicted at a time.
        chunk: Most prompt tokens of one sequence in one step, once it evicts.
        has_statistics: Whether pages carry a tail of attention statistics.
        max_steps_in_flight: Steps that may be scheduled but not yet processed.
    """

    budget: int
    stride: int
    chunk: int
    has_statistics: bool
    max_steps_in_flight: int

    @override
    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_whole_blocks(
            self.block_size, budget=self.budget, stride=self.stride, chunk=self.chunk
        )
        page = self.unpadded_page_size_bytes
        # vLLM pads a page to share it with other kinds of layers, for one block size
        if self.page_size_padded is not None and self.page_size_padded < page:
            object.__setattr__(self, "page_size_padded", page)

    @property
    @override
    def num_heads(self) -> int:
        """The heads of a page, as vLLM sees it."""
        return 1

    @override
    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """Return the states of a page, as vLLM sees it."""
        return 1

    @property
    @override
    def state_content_size_bytes(self) -> int:
        """The bytes of a page: K and V, and the statistics behind them."""
        return self.page_shape.page_bytes(self.block_size, self.dtype)

    @property
    def page_shape(self) -> PageShape:
        """What really lies in a page."""
        return PageShape(self.num_kv_heads, self.head_size, self.has_statistics)

    @classmethod
    def from_attention_spec(
        cls, spec: AttentionSpec, config: RocoConfig, max_steps_in_flight: int
    ) -> RocoSpec:
        """Return the RoCo spec of a layer that vLLM planned as full attention."""
        inherited: dict[str, Any] = {
            field.name: getattr(spec, field.name) for field in fields(AttentionSpec)
        }
        return cls(
            **inherited,
            budget=config.budget,
            stride=config.stride,
            chunk=config.chunk,
            has_statistics=config.measures,
            max_steps_in_flight=max_steps_in_flight,
        )

    @property
    def schedule(self) -> EvictionSchedule:
        """The eviction arithmetic at this spec's block size."""
        return EvictionSchedule(
            block_size=self.block_size, budget=self.budget, stride=self.stride
        )

    @property
    def plan(self) -> ResolvedPlan:
        """What holds for a request of which nothing else is known."""
        in_flight = self.max_steps_in_flight * self.chunk
        return ResolvedPlan(
            self.schedule,
            self.chunk,
            in_flight,
            max_blocks=self.max_blocks_per_sequence,
            snapshot_key=b"",
            ends=ChunkEnds(self.chunk),
        )

    @property
    def max_blocks_per_sequence(self) -> int:
        """The most blocks that a sequence holds whose prompt and answer share it."""
        return self.schedule.max_blocks(self.max_steps_in_flight * self.chunk)

    @override
    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Return the most bytes that one sequence needs in this layer.

        vLLM plans "Maximum concurrency", the fit of one sequence and the automatic
        `max_model_len` with it. It is also the first place in the engine core that sees
        the configuration, before the scheduler is built, so the scheduler that makes
        the bound true is put in place here.
        """
        use_roco_scheduler(vllm_config)
        # read here, not stored: the automatic fit varies it
        max_model_len = vllm_config.model_config.max_model_len
        config = RocoConfig.from_additional_config(vllm_config.additional_config)
        if max_model_len == 1 and _is_a_trial(vllm_config):
            # what one sequence needs was too much, and vLLM asks for what would fit,
            # beginning with one token; then it raises an error that knows no budget
            in_flight = self.max_steps_in_flight
            logger.error_once("%s", too_small(vllm_config, self.block_size, in_flight))
        blocks = most_blocks_by_default(
            config, self.block_size, self.max_steps_in_flight, max_model_len
        )
        return blocks * self.page_size_bytes

    @classmethod
    @override
    def merge(cls, specs: list[RocoSpec]) -> RocoSpec:
        """Return the one spec that all layers of a group share.

        Raises:
            AssertionError: They differ; vLLM then looks for another grouping.
        """
        assert all(spec == specs[0] for spec in specs), (
            "All RoCo layers of a KV cache group must have the same spec."
        )
        return copy.deepcopy(specs[0])

    @override
    def is_uniform_with_collection(
        self, kv_cache_specs: dict[str, KVCacheSpec]
    ) -> bool:
        """Return whether all layers are RoCo layers."""
        return all(type(spec) is type(self) for spec in kv_cache_specs.values())


def _is_a_trial(vllm_config: VllmConfig) -> bool:
    """Return whether one token is a length that vLLM tries.

    Else it is the length that the user asked for, or vLLM looks for the largest that
    fits by itself.
    """
    return vllm_config.model_config.original_max_model_len not in (1, -1)
