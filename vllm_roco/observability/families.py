# SPDX-License-Identifier: Apache-2.0
"""The metrics: what they are called, on `/metrics` and in `EngineMetrics`."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.mmap_dict import mmap_key

LABELS = ("model_name", "engine")


@dataclass(frozen=True)
class Family:
    """One metric.

    Attributes:
        name: Without the suffix that counters have.
        field: What it is in `EngineMetrics`.
        documentation: One sentence for `/metrics`.
        is_counter: Whether it is a counter and not a gauge.
    """

    name: str
    field: str
    documentation: str
    is_counter: bool = False

    @property
    def sample_name(self) -> str:
        """What its lines on `/metrics` begin with."""
        return f"{self.name}_total" if self.is_counter else self.name

    def key(self, model_name: str, engine: int) -> str:
        """Return what a file of prometheus_client calls an engine's number."""
        values = [model_name, str(engine)]
        return mmap_key(
            self.name, self.sample_name, list(LABELS), values, self.documentation
        )


FREED_BLOCKS = Family(
    "vllm:roco_freed_blocks",
    "freed_blocks",
    "Blocks that RoCo's budget gave back to the block manager.",
    is_counter=True,
)
MOVED_BLOCKS = Family(
    "vllm:roco_moved_blocks",
    "moved_blocks",
    "Blocks that were copied over evicted ones, on an engine's first rank.",
    is_counter=True,
)
MAX_SEQUENCE = Family(
    "vllm:roco_max_sequence_kv_tokens",
    "max_sequence_kv_tokens",
    "Most KV tokens that one running sequence holds now, in whole blocks.",
)
PEAK_SEQUENCE = Family(
    "vllm:roco_peak_sequence_kv_tokens",
    "peak_sequence_kv_tokens",
    "Most KV tokens that one sequence ever held, in whole blocks.",
)
BUDGET = Family(
    "vllm:roco_budget_tokens",
    "budget_tokens",
    "KV tokens that RoCo keeps per sequence (the option budget).",
)
FAMILIES = (FREED_BLOCKS, MOVED_BLOCKS, MAX_SEQUENCE, PEAK_SEQUENCE, BUDGET)
