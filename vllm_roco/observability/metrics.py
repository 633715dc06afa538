# SPDX-License-Identifier: Apache-2.0
"""The numbers of the engines that this process started, read where they lie."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_roco.observability.families import (
    BUDGET_FAMILIES,
    FAMILIES,
    PREFIX_FAMILIES,
    REQUEST_BOUND,
    Distribution,
    PrefixCounts,
)
from vllm_roco.observability.file import find_files, read_file
from vllm_roco.observability.file_names import instance_name, process_name

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine


@dataclass(frozen=True, kw_only=True)
class EngineMetrics:
    """The numbers of one engine core since it started.

    Attributes:
        engine: Data-parallel index of the engine core, 0 without data parallelism.
        model_name: Served name of the model, as in vLLM's own metrics.
        budget_tokens: The option `budget`.
        freed_blocks: Blocks given back to vLLM's block manager by the budget. Blocks
            of finished or preempted requests do not count.
        moved_blocks: Blocks that were copied over evicted ones, each once for all
            layers; see `vllm_roco.observability.publisher.MovedBlocks`.
        max_sequence_kv_tokens: Most KV tokens that one running sequence holds now,
            in whole blocks.
        peak_sequence_kv_tokens: Most KV tokens that one sequence ever held.
        peak_request_bound_tokens: The largest of the bounds in `request_bounds`, above
            which no sequence has held anything.
        request_bounds: How many KV tokens requests may come to hold at most, in
            whole blocks: their own bounds, each counted when the request is taken.
        prefix_cache: What the prefix cache did; zeros where it is off.
    """

    engine: int
    model_name: str
    budget_tokens: int
    freed_blocks: int
    moved_blocks: int
    max_sequence_kv_tokens: int
    peak_sequence_kv_tokens: int
    peak_request_bound_tokens: int
    request_bounds: Distribution
    prefix_cache: PrefixCounts


@dataclass(frozen=True, kw_only=True)
class RocoMetrics:
    """The numbers of every engine core that serves one model.

    Attributes:
        engines: One entry per engine core, by engine index; never empty.
    """

    engines: tuple[EngineMetrics, ...]

    @property
    def budget_tokens(self) -> int:
        """The option `budget`, the same in every engine."""
        return self.engines[0].budget_tokens

    @property
    def freed_blocks(self) -> int:
        """Blocks given back by the budget, summed over the engines."""
        return sum(engine.freed_blocks for engine in self.engines)

    @property
    def moved_blocks(self) -> int:
        """Blocks that were copied over evicted ones, summed over the engines."""
        return sum(engine.moved_blocks for engine in self.engines)

    @property
    def max_sequence_kv_tokens(self) -> int:
        """Most KV tokens that one running sequence of any engine holds now."""
        return max(engine.max_sequence_kv_tokens for engine in self.engines)

    @property
    def peak_sequence_kv_tokens(self) -> int:
        """Most KV tokens that one sequence of any engine ever held."""
        return max(engine.peak_sequence_kv_tokens for engine in self.engines)

    @property
    def peak_request_bound_tokens(self) -> int:
        """Most KV tokens that any request of any engine may have come to hold."""
        return max(engine.peak_request_bound_tokens for engine in self.engines)

    @property
    def request_bounds(self) -> Distribution:
        """Most KV tokens that requests may come to hold, of all engines."""
        bounds = [engine.request_bounds for engine in self.engines]
        counts = zip(*(each.counts for each in bounds), strict=True)
        return Distribution(tuple(map(sum, counts)), sum(each.total for each in bounds))

    @property
    def prefix_cache(self) -> PrefixCounts:
        """What the prefix caches did, summed over the engines."""
        counts = [engine.prefix_cache for engine in self.engines]
        return PrefixCounts(*map(sum, zip(*counts, strict=True)))


def get_metrics(llm: LLM | LLMEngine | AsyncLLM) -> RocoMetrics:
    """Return what the budget did so far in the engines of `llm`.

    Works with the engine core in this process and in processes of its own, with and
    without `disable_log_stats`.

    Args:
        llm: An `LLM`, or the `LLMEngine` or `AsyncLLM` itself, in the process that
            created it.

    Raises:
        RuntimeError: No engine of `llm` publishes: another attention backend is in
            use, the engine has been shut down, or its files cannot be written.
    """
    engine: Any = getattr(llm, "llm_engine", llm)
    instance_id = engine.vllm_config.instance_id
    engines = read_engines(instance_id)
    if not engines:
        backend = engine.vllm_config.attention_config.backend
        raise RuntimeError(
            f"roco: no running engine of vLLM instance {instance_id} publishes "
            f"metrics. Its attention backend is {getattr(backend, 'name', backend)}; "
            "the metrics exist while an engine with attention_backend='ROCO' runs "
            "that was started from this process, unless it has warned that it goes on "
            "without them."
        )
    return RocoMetrics(engines=engines)


def read_engines(instance_id: str | None = None) -> tuple[EngineMetrics, ...]:
    """Return the numbers of the live engine cores that this process started.

    Args:
        instance_id: Only the engines of this vLLM instance; None for all of them.

    Returns:
        One entry per engine core, by engine index.
    """
    process = process_name(os.getpid())
    instance = None if instance_id is None else instance_name(instance_id)
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    labels = {}
    for place, name in find_files():
        is_ours = process in (name.process, name.parent)
        if is_ours and instance in (None, name.instance):
            for number in read_file(place, name):
                sums[name.core][number.sample_name] += number.value
                labels[name.core] = number.model_name, number.engine
    engines = [
        EngineMetrics(
            model_name=labels[core][0],
            engine=labels[core][1],
            request_bounds=Distribution(
                tuple(numbers[name] for name in REQUEST_BOUND.bucket_names),
                numbers[REQUEST_BOUND.sum_name],
            ),
            prefix_cache=PrefixCounts(
                *(numbers[family.sample_name] for family in PREFIX_FAMILIES)
            ),
            **{family.field: numbers[family.sample_name] for family in BUDGET_FAMILIES},
        )
        for core, numbers in sums.items()
        # neither a worker's number alone, nor an engine core that just starts or ends
        if all(family.sample_name in numbers for family in FAMILIES)
        and REQUEST_BOUND.sum_name in numbers
    ]
    return tuple(sorted(engines, key=lambda metrics: metrics.engine))
