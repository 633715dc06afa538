# SPDX-License-Identifier: Apache-2.0
"""Reads vLLM's own metrics while one of its benchmarks runs in this process.

An engine's counters begin with its first call, so a call's figures are differences.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Metric

INTERVAL = 0.02
"""Seconds between two looks; a look takes some 0.1 ms."""

RUNNING = "vllm:num_requests_running"
PREEMPTIONS = "vllm:num_preemptions_total"
QUERIES = "vllm:prefix_cache_queries_total"
HITS = "vllm:prefix_cache_hits_total"
FINISHED = "vllm:request_success_total"
FIRST_TOKEN = "vllm:time_to_first_token_seconds"
LATER_TOKENS = "vllm:request_time_per_output_token_seconds"
NAMES = [
    *(RUNNING, PREEMPTIONS, QUERIES, HITS, FINISHED),
    *(f"{FIRST_TOKEN}_sum", f"{FIRST_TOKEN}_count"),
    *(f"{LATER_TOKENS}_sum", f"{LATER_TOKENS}_count"),
]


def read(registry: CollectorRegistry = REGISTRY) -> Mapping[str, float]:
    """Return the values of `NAMES` now, 0 where no engine has registered them."""
    return summed(registry.restricted_registry(NAMES).collect())


def summed(metrics: Iterable[Metric]) -> Mapping[str, float]:
    """Return the sum of each name's samples over their labels, 0 for other names."""
    values: dict[str, float] = defaultdict(float)
    for metric in metrics:
        for sample in metric.samples:
            values[sample.name] += sample.value
    return values


def cached_and_preempted(
    before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, object]:
    """Return columns of what an engine counted between two looks.

    They are the share of the prompts' tokens that it found in its cache, None where it
    did not look, and how often a request was preempted.
    """
    queries, hits, preemptions = (
        after[name] - before[name] for name in (QUERIES, HITS, PREEMPTIONS)
    )
    return {
        "hit_rate": round(hits / queries, 4) if queries else None,
        "preemptions": round(preemptions),
    }


class Counters:
    """Counts what one engine does within the `with` block.

    Args:
        num_warmups: Requests that the block serves first and that do not count.
        registry: Where the engine registers its metrics.

    Attributes:
        max_running: Most requests running at once, once the warm-up has finished.
    """

    def __init__(
        self, num_warmups: int, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self.max_running = 0
        self._num_warmups = num_warmups
        self._registry = registry
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Counters:
        self._begin = self._warm = read(self._registry)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._end = read(self._registry)

    @property
    def preemptions(self) -> int:
        """How often a request was preempted."""
        return round(self._counted(PREEMPTIONS))

    @property
    def ttft_ms(self) -> float:
        """Mean milliseconds to a request's first token, waiting included."""
        return self._mean_ms(FIRST_TOKEN)

    @property
    def tpot_ms(self) -> float:
        """Mean over the requests of milliseconds a later token."""
        return self._mean_ms(LATER_TOKENS)

    def _watch(self) -> None:
        while not self._is_over.wait(INTERVAL):
            now = read(self._registry)
            # a call may have fewer requests than its warm-up
            if now[FINISHED] - self._begin[FINISHED] >= self._num_warmups:
                self.max_running = max(self.max_running, round(now[RUNNING]))
            # the last look before the first request that counts has a token
            first = f"{FIRST_TOKEN}_count"
            if now[first] - self._begin[first] <= self._num_warmups:
                self._warm = now

    def _counted(self, name: str) -> float:
        return self._end[name] - self._warm[name]

    def _mean_ms(self, name: str) -> float:
        return 1e3 * self._counted(f"{name}_sum") / self._counted(f"{name}_count")
