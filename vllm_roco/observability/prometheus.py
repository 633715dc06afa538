# SPDX-License-Identifier: Apache-2.0
"""Shows the metrics on vLLM's `/metrics`.

One API server exposes the registry of its own process. There a collector reads the
engines' files at the moment of the scrape: always the newest numbers, nothing to do
per output, and `--disable-log-stats` does not silence it. A plugin of the group
`vllm.stat_logger_plugins` would do neither: vLLM answers the mere presence of one by
collecting all of its statistics against that option, for every backend.

Several API servers expose a directory, where the engines' files lie then
(`vllm_roco.observability.places`), and prometheus_client itself reads them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from operator import attrgetter

from prometheus_client import REGISTRY
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from vllm_roco.observability.families import (
    FAMILIES,
    LABELS,
    REQUEST_BOUND,
    Distribution,
    Family,
)
from vllm_roco.observability.metrics import RocoMetrics, read_engines


class RocoCollector:
    """Reads the engines that this process started, at every scrape.

    It has no `_name`, by which vLLM would take it for a metric of its own and
    unregister it when it builds its loggers.
    """

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics without samples: the names that this collector owns."""
        for family in FAMILIES:
            yield _empty(family)
        yield _histogram()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; nothing while no engine uses the ROCO backend."""
        labels = attrgetter(*LABELS)
        engines = sorted(read_engines(), key=labels)
        # two models of one name in one process must not repeat a line
        groups = {
            key: RocoMetrics(engines=tuple(group))
            for key, group in itertools.groupby(engines, key=labels)
        }
        if not groups:
            return
        for family in FAMILIES:
            metric = _empty(family)
            number_of = attrgetter(family.field)
            for (model_name, engine), metrics in groups.items():
                metric.add_metric([model_name, str(engine)], number_of(metrics))
            yield metric
        histogram = _histogram()
        for (model_name, engine), metrics in groups.items():
            bounds = metrics.request_bounds
            histogram.add_metric(
                [model_name, str(engine)], _buckets(bounds), bounds.total
            )
        yield histogram


@functools.cache
def register_collector() -> None:
    """Add the collector to this process's registry, once."""
    REGISTRY.register(RocoCollector())


def _empty(family: Family) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if family.is_counter else GaugeMetricFamily
    return kind(family.name, family.documentation, labels=LABELS)


def _histogram() -> HistogramMetricFamily:
    family = REQUEST_BOUND
    return HistogramMetricFamily(family.name, family.documentation, labels=LABELS)


def _buckets(distribution: Distribution) -> list[tuple[str, float]]:
    """Return each bound and how many are not above it."""
    sums = itertools.accumulate(distribution.counts)
    return list(zip(REQUEST_BOUND.labels, sums, strict=True))
