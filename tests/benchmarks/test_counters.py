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


def serve() -> None:
    """Do to the registry what an engine does that serves two and then four requests."""
    labels = ["model_name", "engine"]
    mine = {"model_name": "a model", "engine": "0"}
    running = Gauge("vllm:num_requests_running", "", labels).labels(**mine)
    preemptions = Counter("vllm:num_preemptions", "", labels).labels(**mine)
    first = Histogram(FIRST_TOKEN, "", labels).labels(**mine)
    later = Histogram(LATER_TOKENS, "", labels).labels(**mine)
    for count, seconds in ((2, 9.0), (4, 0.5)):
        running.set(count)
        time.sleep(LONG_ENOUGH)
        for _ in range(count):
            first.observe(seconds)
            later.observe(seconds / 10)
            preemptions.inc()
        running.set(0)
        time.sleep(LONG_ENOUGH)


def test_warm_up_does_not_count() -> None:
    for _ in range(2):
        # the second engine starts from nothing, whatever the first has left
        with Counters(num_warmups=2) as counters:
            serve()
        assert counters.max_running == 4
        assert counters.preemptions == 4
        assert counters.ttft_ms == pytest.approx(500)
        assert counters.tpot_ms == pytest.approx(50)
