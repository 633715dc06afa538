# SPDX-License-Identifier: Apache-2.0
"""How kernels are timed here: shared by the benchmarks of this folder.

Every timed call is one of several inside a CUDA graph, each on memory of its own, as
the layers of a model are, so that none finds its input in the L2 cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import triton
import triton.testing

T = TypeVar("T")

COLD_BYTES = 256 * 2**20
"""What the calls of one graph read together, several times any L2 cache."""


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median and the 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        values = torch.tensor(samples, dtype=torch.float64).quantile(quantiles)
        return cls(*(round(float(value), 3) for value in values))

    def columns(self, name: str) -> dict[str, float]:
        """Return the columns of a table that tell it."""
        names = (f"{name}_us", f"{name}_low", f"{name}_high")
        return dict(zip(names, (self.median, self.low, self.high), strict=True))


def command(about: str | None, time_limit: float) -> argparse.ArgumentParser:
    """Return a benchmark's command line: where its files go, and how long it may take.

    Args:
        about: What it measures.
        time_limit: Seconds, by default.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--time-limit", type=float, default=time_limit, metavar="SECONDS"
    )
    return parser


def within(seconds: float, items: Iterable[T]) -> Iterator[T]:
    """Yield items as long as one more like the slowest so far ends in time."""
    end = time.monotonic() + seconds
    slowest = 0.0
    for item in items:
        began = time.monotonic()
        if began + slowest > end:
            print(f"left out for want of time: {item}", flush=True)
            continue
        yield item
        slowest = max(slowest, time.monotonic() - began)


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of the calls, each of which has run before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def median_of(calls: Sequence[Callable[[], object]], milliseconds: float) -> float:
    """Return the median microseconds a call, timed alone."""
    return Timing.of(sample(captured(calls), len(calls), milliseconds)).median


def sample(graph: torch.cuda.CUDAGraph, calls: int, milliseconds: float) -> list[float]:
    """Return microseconds a call, one number for every replay of the graph."""
    times = triton.testing.do_bench(
        graph.replay, warmup=milliseconds / 4, rep=milliseconds, return_mode="all"
    )
    return [1e3 * time / calls for time in times]


def interleaved(
    variants: Mapping[str, Sequence[Callable[[], object]]],
    *,
    rounds: int,
    milliseconds: float,
) -> dict[str, Timing]:
    """Time variants in turns, so that a drift of the clock meets all of them.

    Args:
        variants: Name to calls, which are captured into one graph.
        rounds: How often each variant has its turn.
        milliseconds: Length of a turn.
    """
    graphs = {name: captured(calls) for name, calls in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, graph in graphs.items():
            samples[name] += sample(graph, len(variants[name]), milliseconds)
    return {name: Timing.of(times) for name, times in samples.items()}


def copy_bandwidth() -> float:
    """Return bytes read plus bytes written a second of a large copy."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = interleaved(
        {"copy": [lambda: target.copy_(source)]}, rounds=3, milliseconds=50
    )["copy"]
    return 2 * source.numel() / (timing.median * 1e-6)
