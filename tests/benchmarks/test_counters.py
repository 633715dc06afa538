# SPDX-License-Identifier: Apache-2.0
"""Of an engine's metrics, what the warm-up added does not count."""

from __future__ import annotations

import contextlib
import time
from typing import TypeVar

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from benchmarks.serving.counters import (
    FIRST_TOKEN,
    INTERVAL,
    LATER_TOKENS,
    RUNNING,
    Counters,
)

M = TypeVar("M", Counter, Gauge, Histogram)

# on busy cores a thread may sleep through several intervals
LONG_ENOUGH = 15 * INTERVAL


@pytest.fixture
def registry() -> CollectorRegistry:
    """A registry of the test's own; an engine of another test may use the default.

    Tests that used the default one failed with `DuplicateTimeseries` when an engine
    that ran before in their process had left `vllm:num_requests_running` there. It is
    there now in any case.
    """
    with contextlib.suppress(ValueError):
        Gauge(RUNNING, "what an engine leaves")
    return CollectorRegistry()


class Metrics:
    """Does to the registry what an engine does."""

    def __init__(self, registry: CollectorRegistry) -> None:
        mine = {"model_name": "a model", "engine": "0"}

        def made(kind: type[M], name: str, **more: str) -> M:
            labels = mine | more
            return kind(name, "", list(labels), registry=registry).labels(**labels)

        self.running = made(Gauge, RUNNING)
        self.preemptions = made(Counter, "vllm:num_preemptions")
        self.finished = made(Counter, "vllm:request_success", finished_reason="length")
        self.first = made(Histogram, FIRST_TOKEN)
        self.later = made(Histogram, LATER_TOKENS)

    def serve(self, count: int, seconds: float) -> None:
        self.running.set(count)
        time.sleep(LONG_ENOUGH)
        for _ in range(count):
            self.first.observe(seconds)
            self.later.observe(seconds / 10)
            self.preemptions.inc()
            self.finished.inc()
            self.running.dec()
        time.sleep(LONG_ENOUGH)


def test_warm_up_does_not_count(registry: CollectorRegistry) -> None:
    with Counters(2, registry) as counters:
        # an engine registers its metrics at its start
        metrics = Metrics(registry)
        metrics.serve(2, seconds=9)
        metrics.serve(4, seconds=0.5)
    assert counters.max_running == 4
    assert counters.preemptions == 4
    assert counters.ttft_ms == pytest.approx(500)
    assert counters.tpot_ms == pytest.approx(50)


@pytest.mark.parametrize("num_warmups", [0, 4])
def test_calls_before_do_not_count(
    num_warmups: int, registry: CollectorRegistry
) -> None:
    metrics = Metrics(registry)
    metrics.serve(8, seconds=7)
    with Counters(num_warmups, registry) as counters:
        if num_warmups:
            metrics.serve(num_warmups, seconds=9)
        metrics.serve(3, seconds=0.5)
    metrics.serve(5, seconds=7)
    assert counters.max_running == 3
    assert counters.preemptions == 3
    assert counters.ttft_ms == pytest.approx(500)
    assert counters.tpot_ms == pytest.approx(50)
