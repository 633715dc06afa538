# SPDX-License-Identifier: Apache-2.0
"""What `/metrics` shows: with one API server, and with several."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from vllm.v1.metrics.prometheus import (
    get_prometheus_registry,
    unregister_vllm_metrics,
)
from vllm.v1.metrics.reader import (
    Counter,
    Gauge,
    Histogram,
    get_metrics_snapshot,
)

from tests.observability.publishing import prefix_counts, publisher, run_engine
from vllm_roco.observability.families import REQUEST_BOUND, PrefixCounts
from vllm_roco.observability.metrics import read_engines
from vllm_roco.observability.prometheus import RocoCollector, register_collector
from vllm_roco.observability.publisher import MovedBlocks

Method = Literal["fork", "spawn"]
Samples = dict[tuple[str, str], float]

FREED = "vllm:roco_freed_blocks_total"
MOVED = "vllm:roco_moved_blocks_total"
MAX = "vllm:roco_max_sequence_kv_tokens"
PEAK = "vllm:roco_peak_sequence_kv_tokens"
BUDGET = "vllm:roco_budget_tokens"
PREFIX_COUNTERS = {
    f"vllm:roco_prefix_{name}_total"
    for name in (
        *("published_snapshots", "dead_snapshots"),
        *("snapshot_hits", "block_hits", "saved_tokens", "waits"),
    )
}
LIVE = "vllm:roco_prefix_live_snapshots"
BOUND = "vllm:roco_request_bound_tokens"
PEAK_BOUND = "vllm:roco_peak_request_bound_tokens"


@pytest.fixture
def multiprocess_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set what vLLM sets for several API servers, after the client's import."""
    directory = tmp_path / "multiprocess"
    directory.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
    return directory


def scrape(registry: Collector) -> Samples:
    """Return {(sample name, engine): value} of RoCo's lines, refusing a repeat."""
    samples: Samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if sample.name.startswith("vllm:roco"):
                name = sample.name
                if name.startswith(BOUND):
                    assert family.type == "histogram"
                    if (bound := sample.labels.pop("le", None)) is not None:
                        name += f" {bound}"
                else:
                    is_counter = name in {FREED, MOVED} | PREFIX_COUNTERS
                    assert family.type == ("counter" if is_counter else "gauge")
                assert set(sample.labels) == {"model_name", "engine"}
                key = name, sample.labels["engine"]
                assert key not in samples, "a repeated line fails the whole scrape"
                samples[key] = sample.value
    return samples


def of_prefixes(counts: PrefixCounts, engine: str) -> Samples:
    """Return the lines that stand for an engine's prefix cache."""
    lines = {
        LIVE: counts.live_snapshots,
        "vllm:roco_prefix_published_snapshots_total": counts.published_snapshots,
        "vllm:roco_prefix_dead_snapshots_total": counts.dead_snapshots,
        "vllm:roco_prefix_snapshot_hits_total": counts.snapshot_hits,
        "vllm:roco_prefix_block_hits_total": counts.block_hits,
        "vllm:roco_prefix_saved_tokens_total": counts.saved_tokens,
        "vllm:roco_prefix_waits_total": counts.waits,
    }
    return {(name, engine): number for name, number in lines.items()}


def of_bounds(engine: str, *sizes: int) -> Samples:
    """Return the lines that stand for requests with such bounds."""
    lines: dict[str, float] = {
        f"{BOUND}_bucket {label}": sum(size <= float(label) for size in sizes)
        for label in REQUEST_BOUND.labels
    }
    lines |= {f"{BOUND}_count": len(sizes), f"{BOUND}_sum": sum(sizes)}
    lines[PEAK_BOUND] = max(sizes)
    return {(name, engine): number for name, number in lines.items()}


@contextlib.contextmanager
def running_engine(method: Method, engine: int) -> Iterator[Connection]:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=run_engine, args=(engine, theirs))
    process.start()
    try:
        yield ours
    finally:
        ours.send(None)
        process.join(60)


def tell(engine: Connection, freed_blocks: int) -> None:
    engine.send(freed_blocks)
    assert engine.poll(60)
    engine.recv()


def test_nothing_is_shown_without_an_engine() -> None:
    registry = CollectorRegistry()
    registry.register(RocoCollector())
    assert generate_latest(registry) == b""


def test_a_scrape_shows_the_newest_numbers() -> None:
    registry = CollectorRegistry()
    registry.register(RocoCollector())
    with contextlib.closing(publisher(engine=3)) as owned:
        moved = MovedBlocks("1", 3)
        bounds: list[int] = []
        for freed_blocks, moved_blocks, tokens in ((2, 1, 96), (5, 3, 80)):
            counts = prefix_counts(freed_blocks)
            bounds.append(2 * tokens)
            owned.count_request(bounds[-1])
            owned.publish(freed_blocks, tokens)
            owned.publish_prefixes(counts)
            moved.add(moved_blocks - read_engines()[0].moved_blocks)
            assert scrape(registry) == {
                (FREED, "3"): freed_blocks,
                (MOVED, "3"): moved_blocks,
                (MAX, "3"): tokens,
                (PEAK, "3"): 96,
                (BUDGET, "3"): 64,
                **of_prefixes(counts, "3"),
                **of_bounds("3", *bounds),
            }
    assert scrape(registry) == {}


def test_engines_have_lines_of_their_own_and_none_is_repeated() -> None:
    registry = CollectorRegistry()
    registry.register(RocoCollector())
    with (
        contextlib.closing(publisher(engine=0)) as first,
        contextlib.closing(publisher(engine=1)) as second,
        contextlib.closing(publisher(engine=1)) as namesake,
    ):
        first.publish(1, 16)
        second.publish(2, 32)
        namesake.publish(3, 48)
        for number, owned in enumerate((first, second, namesake), start=1):
            owned.publish_prefixes(PrefixCounts(number, number))
        samples = scrape(registry)
    assert [samples[FREED, engine] for engine in "01"] == [1, 5]
    assert [samples[MAX, engine] for engine in "01"] == [16, 48]
    published = "vllm:roco_prefix_published_snapshots_total"
    assert [samples[published, engine] for engine in "01"] == [1, 5]
    assert [samples[LIVE, engine] for engine in "01"] == [1, 5]


def test_the_metrics_outlive_vllm_building_its_loggers() -> None:
    """vLLM unregisters every collector that looks like one of its own metrics."""
    register_collector()
    register_collector()
    with contextlib.closing(publisher()) as owned:
        owned.publish(5, 80)
        unregister_vllm_metrics()
        assert scrape(get_prometheus_registry())[FREED, "0"] == 5
        assert scrape(REGISTRY.restricted_registry([MAX])) == {(MAX, "0"): 80}


def test_vllm_reads_them_offline_too() -> None:
    register_collector()
    with contextlib.closing(publisher()) as owned:
        owned.publish(5, 80)
        owned.count_request(200)
        snapshot = {metric.name: metric for metric in get_metrics_snapshot()}
    labels = {"model_name": "m", "engine": "0"}
    assert snapshot[FREED.removesuffix("_total")] == Counter(
        FREED.removesuffix("_total"), labels, 5
    )
    assert snapshot[MAX] == Gauge(MAX, labels, 80.0)
    bounds = snapshot[BOUND]
    assert isinstance(bounds, Histogram)
    assert (bounds.labels, bounds.count, bounds.sum) == (labels, 1, 200)
    assert bounds.buckets["192.0"] == 0
    assert bounds.buckets["224.0"] == bounds.buckets["+Inf"] == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.usefixtures("multiprocess_directory")
def test_several_api_servers_show_each_engine_once(method: Method) -> None:
    # each API server has such a registry; they must agree
    servers = [get_prometheus_registry() for _ in range(2)]
    with running_engine(method, 0) as first, running_engine(method, 1) as second:
        seen: list[int] = []
        for times, freed_blocks in enumerate((2, 7), start=1):
            seen.append(16 * freed_blocks)
            tell(first, freed_blocks)
            tell(second, 10 * freed_blocks)
            expected = {
                (FREED, "0"): freed_blocks,
                (FREED, "1"): 10 * freed_blocks,
                (MOVED, "0"): times,
                (MOVED, "1"): times,
                (MAX, "0"): 0,
                (MAX, "1"): 0,
                (PEAK, "0"): 16 * freed_blocks,
                (PEAK, "1"): 160 * freed_blocks,
                (BUDGET, "0"): 64,
                (BUDGET, "1"): 64,
                **of_prefixes(prefix_counts(freed_blocks), "0"),
                **of_prefixes(prefix_counts(10 * freed_blocks), "1"),
                **of_bounds("0", *seen),
                **of_bounds("1", *(10 * size for size in seen)),
            }
            assert [scrape(server) for server in servers] == [expected, expected]


def test_the_shared_files_are_not_those_of_other_metrics(
    multiprocess_directory: Path, directory: Path
) -> None:
    """Two writers of one file of prometheus_client would corrupt it."""
    with contextlib.closing(publisher()), contextlib.closing(publisher()):
        names = sorted(path.name for path in multiprocess_directory.iterdir())
        assert not directory.exists()
    kinds = [name.partition("_roco-")[0] for name in names]
    assert kinds == ["counter"] * 2 + ["gauge_max"] * 2 + ["histogram"] * 2
    assert list(multiprocess_directory.iterdir()) == []


def test_programs_read_the_shared_directory_too(multiprocess_directory: Path) -> None:
    """`get_metrics` must not need another place than the API servers."""
    with contextlib.closing(publisher()) as owned:
        moved = MovedBlocks("1", 0)
        owned.publish(5, 80)
        moved.add(3)
        assert len(list(multiprocess_directory.iterdir())) == 4
        (metrics,) = read_engines()
    assert (metrics.freed_blocks, metrics.moved_blocks) == (5, 3)
