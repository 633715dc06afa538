# SPDX-License-Identifier: Apache-2.0
"""Of an engine's metrics, what the warm-up added does not count."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from benchmarks.serving.counters import FIRST_TOKEN, INTERVAL, LATER_TOKENS, Counters

# on busy cores a thread may sleep through several intervals
LONG_ENOUGH = 15 * INTERVAL


@pytest.fixture(autouse=True)
def no_metrics_are_left() -> Iterator[None]:
    yield
    unregister_vllm_metrics()


class Metrics:
    """Does to the registry what an engine does."""

    def __init__(self) -> None:
        labels = ["model_name", "engine"]
        mine = {"model_name": "a model", "engine": "0"}
        self.running = Gauge("vllm:num_requests_running", "", labels).labels(**mine)
        self.preemptions = Counter("vllm:num_preemptions", "", labels).labels(**mine)
        reasons = Counter("vllm:request_success", "", [*labels, "finished_reason"])
        self.finished = reasons.labels(**mine, finished_reason="length")
        self.first = Histogram(FIRST_TOKEN, "", labels).labels(**mine)
        self.later = Histogram(LATER_TOKENS, "", labels).labels(**mine)

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


def test_warm_up_does_not_count() -> None:
    with Counters(num_warmups=2) as counters:
        # an engine registers its metrics at its start
        metrics = Metrics()
        metrics.serve(2, seconds=9)
        metrics.serve(4, seconds=0.5)
    assert counters.max_running == 4
    assert counters.preemptions == 4
    assert counters.ttft_ms == pytest.approx(500)
    assert counters.tpot_ms == pytest.approx(50)


@pytest.mark.parametrize("num_warmups", [0, 4])
def test_calls_before_do_not_count(num_warmups: int) -> None:
    metrics = Metrics()
    metrics.serve(8, seconds=7)
    with Counters(num_warmups) as counters:
        if num_warmups:
            metrics.serve(num_warmups, seconds=9)
        metrics.serve(3, seconds=0.5)
    metrics.serve(5, seconds=7)
    assert counters.max_running == 3
    assert counters.preemptions == 3
    assert counters.ttft_ms == pytest.approx(500)
    assert counters.tpot_ms == pytest.approx(50)
