# SPDX-License-Identifier: Apache-2.0
"""How kernels are timed here, and on what: shared by the benchmarks of this folder.

Every timed call is one of several inside a CUDA graph, each on memory of its own, as
the layers of a model are, so that none finds its input in the L2 cache.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.testing

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


def environment() -> dict[str, str]:
    """Return what the figures depend on beside the code."""

    def output(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    here = str(Path(__file__).parent)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": version("vllm"),
        "xformers": version("xformers"),
        "commit": output("git", "-C", here, "describe", "--always", "--dirty"),
        "command": " ".join(sys.argv),
    }
