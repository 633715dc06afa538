# SPDX-License-Identifier: Apache-2.0
"""The metrics: what they are called, on `/metrics` and in `EngineMetrics`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple, get_type_hints

from prometheus_client.mmap_dict import mmap_key

LABELS = ("model_name", "engine")


@dataclass(frozen=True)
class Family:
    """One metric.

    Attributes:
        name: Without the suffix that counters have.
        field: Where it is in `EngineMetrics`, with a dot for what is inside of a field.
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
BUDGET_FAMILIES = (FREED_BLOCKS, MOVED_BLOCKS, MAX_SEQUENCE, PEAK_SEQUENCE, BUDGET)


class Meaning(NamedTuple):
    """What a field of `PrefixCounts` counts.

    Attributes:
        documentation: One sentence for `/metrics`.
        is_counter: Whether it only grows.
    """

    documentation: str
    is_counter: bool = True


class PrefixCounts(NamedTuple):
    """What the prefix cache holds, and has done since its engine started.

    This is the table of its metrics: `vllm:roco_prefix_` and the name of a field.
    """

    live_snapshots: Annotated[
        int,
        Meaning("Snapshots of prefixes that requests can begin with now.", False),
    ] = 0
    published_snapshots: Annotated[int, Meaning("Snapshots of prefixes made.")] = 0
    dead_snapshots: Annotated[
        int,
        Meaning("Snapshots that were overwritten before a look-up asked for them."),
    ] = 0
    snapshot_hits: Annotated[int, Meaning("Requests let in behind a snapshot.")] = 0
    block_hits: Annotated[
        int, Meaning("Requests let in behind blocks of others that evicted nothing.")
    ] = 0
    saved_tokens: Annotated[
        int,
        Meaning("Tokens that these requests did not have to read."),
    ] = 0
    waits: Annotated[
        int,
        Meaning("Requests that have waited while another one read their prefix."),
    ] = 0


def _prefix_families() -> Iterator[Family]:
    for field, hint in get_type_hints(PrefixCounts, include_extras=True).items():
        (meaning,) = hint.__metadata__
        yield Family(f"vllm:roco_prefix_{field}", f"prefix_cache.{field}", *meaning)


PREFIX_FAMILIES = tuple(_prefix_families())
"""One for each field of `PrefixCounts`, in their order."""

FAMILIES = (*BUDGET_FAMILIES, *PREFIX_FAMILIES)
