# SPDX-License-Identifier: Apache-2.0
"""The metrics: what they are called, on `/metrics` and in `EngineMetrics`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple, get_type_hints

from prometheus_client.mmap_dict import mmap_key
from prometheus_client.utils import floatToGoString

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


@dataclass(frozen=True)
class Histogram:
    """One metric that is a distribution.

    Attributes:
        name: What its lines on `/metrics` begin with.
        field: Where it is in `EngineMetrics`.
        documentation: One sentence for `/metrics`.
        bounds: The greatest number of each bucket but the last, which has none.
    """

    name: str
    field: str
    documentation: str
    bounds: tuple[int, ...]

    @property
    def labels(self) -> list[str]:
        """The bounds as `/metrics` spells them, that of the last bucket included."""
        return [floatToGoString(bound) for bound in (*self.bounds, float("inf"))]

    @property
    def bucket_names(self) -> list[str]:
        """What a file calls the buckets, see `bucket_name`."""
        return [bucket_name(f"{self.name}_bucket", label) for label in self.labels]

    @property
    def sum_name(self) -> str:
        """What a file calls the sum of all that was counted."""
        return f"{self.name}_sum"

    def keys(self, model_name: str, engine: int) -> tuple[list[str], str]:
        """Return what a file of prometheus_client calls the buckets and their sum."""
        names, values = list(LABELS), [model_name, str(engine)]
        bucket = f"{self.name}_bucket"
        buckets = [
            mmap_key(
                self.name, bucket, [*names, "le"], [*values, label], self.documentation
            )
            for label in self.labels
        ]
        sum_key = mmap_key(self.name, self.sum_name, names, values, self.documentation)
        return buckets, sum_key


def bucket_name(sample_name: str, label: str) -> str:
    """Return a name that tells the buckets of a histogram apart."""
    return f'{sample_name}{{le="{label}"}}'


class Distribution(NamedTuple):
    """How often each size was counted.

    Attributes:
        counts: Of each bucket alone, in the order of `Histogram.bounds`, those beyond
            the last bound at the end.
        total: The sum of all sizes.
    """

    counts: tuple[int, ...]
    total: int


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
PEAK_BOUND = Family(
    "vllm:roco_peak_request_bound_tokens",
    "peak_request_bound_tokens",
    "Most KV tokens that any request so far may have come to hold, in whole blocks.",
)
BUDGET_FAMILIES = (
    FREED_BLOCKS,
    MOVED_BLOCKS,
    MAX_SEQUENCE,
    PEAK_SEQUENCE,
    PEAK_BOUND,
    BUDGET,
)
REQUEST_BOUND = Histogram(
    "vllm:roco_request_bound_tokens",
    "request_bounds",
    "Most KV tokens that each request may come to hold, in whole blocks.",
    # four a doubling, so that what lies between is a quarter off at most
    bounds=(
        *(quarters << power for power in range(5, 18) for quarters in range(4, 8)),
        2**20,
    ),
)


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
"""All that are one number."""
