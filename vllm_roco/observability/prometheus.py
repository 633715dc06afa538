# SPDX-License-Identifier: Apache-2.0
"""Shows `vllm_roco.metrics` on vLLM's `/metrics`, whichever way vLLM serves it.

One API server exposes the registry of its own process. There a collector reads the
engines' files at the moment of the scrape: always the newest numbers, nothing to do
per step or per output, and `--disable-log-stats` does not silence it. A plugin of the
group `vllm.stat_logger_plugins` would do neither: vLLM answers the mere presence of
one by collecting all of its statistics against that option, for every backend.

Several API servers share a directory of counters, `PROMETHEUS_MULTIPROC_DIR`, which
vLLM sets before it starts the engines. There the engine cores write into that
directory themselves, so each number has one writer and none is counted twice.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.values import MultiProcessValue

from vllm_roco.observability.metrics import MetricsPublisher, RocoMetrics, read_engines

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MULTIPROCESS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_LABELS = ("model_name", "engine")


@dataclass(frozen=True)
class _Family:
    """One metric: its name without suffix, and the field of `RocoMetrics` it shows."""

    name: str
    field: str
    documentation: str
    is_counter: bool = False

    @property
    def sample_name(self) -> str:
        return f"{self.name}_total" if self.is_counter else self.name

    def empty(self) -> CounterMetricFamily | GaugeMetricFamily:
        kind = CounterMetricFamily if self.is_counter else GaugeMetricFamily
        return kind(self.name, self.documentation, labels=_LABELS)


_FREED_BLOCKS = _Family(
    "vllm:roco_freed_blocks",
    "freed_blocks",
    "Blocks that RoCo's budget gave back to the block manager.",
    is_counter=True,
)
_MOVED_BLOCKS = _Family(
    "vllm:roco_moved_blocks",
    "moved_blocks",
    "Blocks that were copied over evicted ones, on an engine's first rank.",
    is_counter=True,
)
_MAX_SEQUENCE = _Family(
    "vllm:roco_max_sequence_kv_tokens",
    "max_sequence_kv_tokens",
    "Most KV tokens that one running sequence holds now, in whole blocks.",
)
_PEAK_SEQUENCE = _Family(
    "vllm:roco_peak_sequence_kv_tokens",
    "peak_sequence_kv_tokens",
    "Most KV tokens that one sequence ever held, in whole blocks.",
)
_BUDGET = _Family(
    "vllm:roco_budget_tokens",
    "budget_tokens",
    "KV tokens that RoCo keeps per sequence (the option budget).",
)
_FAMILIES = (_FREED_BLOCKS, _MOVED_BLOCKS, _MAX_SEQUENCE, _PEAK_SEQUENCE, _BUDGET)


class RocoCollector:
    """Reads the engines that this process started, at every scrape.

    It has no `_name`, by which vLLM would take it for a metric of its own and
    unregister it when it builds its loggers.
    """

    def describe(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the metrics without samples: the names that this collector owns."""
        for family in _FAMILIES:
            yield family.empty()

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the metrics; nothing while no engine uses the ROCO backend."""
        labels = attrgetter(*_LABELS)
        engines = sorted(read_engines(), key=labels)
        # two models of one name in one process must not repeat a line
        groups = {
            key: RocoMetrics(engines=tuple(group))
            for key, group in itertools.groupby(engines, key=labels)
        }
        if not groups:
            return
        for family in _FAMILIES:
            metric = family.empty()
            for (model_name, engine), metrics in groups.items():
                metric.add_metric(
                    [model_name, str(engine)], getattr(metrics, family.field)
                )
            yield metric


class MultiprocessPublisher(MetricsPublisher):
    """Also writes into the directory that several API servers expose."""

    def __init__(
        self, *, instance_id: str, engine: int, model_name: str, budget_tokens: int
    ) -> None:
        super().__init__(
            instance_id=instance_id,
            engine=engine,
            model_name=model_name,
            budget_tokens=budget_tokens,
        )
        # a file of its own, and independent of what prometheus_client found in the
        # environment when a process that later forked imported it
        value_class = MultiProcessValue(lambda: f"roco{os.getpid()}")
        self._exported = {
            family: value_class(
                "counter" if family.is_counter else "gauge",
                family.name,
                family.sample_name,
                _LABELS,
                (model_name, str(engine)),
                family.documentation,
                multiprocess_mode="" if family.is_counter else "mostrecent",
            )
            for family in _FAMILIES
        }
        self._set(_BUDGET, budget_tokens)
        self._published: tuple[int, int, int] | None = None
        self.publish(0, 0)

    def publish(self, freed_blocks: int, max_sequence_kv_tokens: int) -> None:
        """See `MetricsPublisher.publish`."""
        numbers = freed_blocks, max_sequence_kv_tokens, self.moved_blocks
        # most steps change nothing, and these stores are dearer
        if numbers == self._published:
            return
        self._published = numbers
        super().publish(freed_blocks, max_sequence_kv_tokens)
        self._set(_FREED_BLOCKS, freed_blocks)
        self._set(_MOVED_BLOCKS, numbers[2])
        self._set(_MAX_SEQUENCE, max_sequence_kv_tokens)
        self._set(_PEAK_SEQUENCE, self._peak)

    def _set(self, family: _Family, number: int) -> None:
        self._exported[family].set(float(number), timestamp=time.time())


def create_publisher(vllm_config: VllmConfig, budget_tokens: int) -> MetricsPublisher:
    """Return the publisher of this engine core.

    Args:
        vllm_config: The engine core's configuration.
        budget_tokens: The option `budget`.

    Raises:
        OSError: See `MetricsPublisher`.
    """
    model_name = vllm_config.model_config.served_model_name
    # of several names the configuration keeps the first
    assert isinstance(model_name, str)
    shared = os.path.isdir(os.environ.get(_MULTIPROCESS_DIRECTORY, ""))
    publisher = MultiprocessPublisher if shared else MetricsPublisher
    return publisher(
        instance_id=vllm_config.instance_id,
        engine=vllm_config.parallel_config.data_parallel_index,
        model_name=model_name,
        budget_tokens=budget_tokens,
    )


@functools.cache
def register_collector() -> None:
    """Add the collector to this process's registry, once."""
    REGISTRY.register(RocoCollector())
