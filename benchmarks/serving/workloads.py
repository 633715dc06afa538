# SPDX-License-Identifier: Apache-2.0
"""What is served, and by which engines: every figure's workload, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.serving.engines import Engine, Requests
from vllm_roco.config import RocoConfig

VARIANTS: dict[str, tuple[str, Mapping[str, Any] | None]] = {
    "stock": ("auto", None),
    "stock-fp8": ("fp8", None),
    "recent": ("auto", {"policy": "recent"}),
    "roco": ("auto", {}),
    "roco-fp8": ("fp8", {}),
    "roco-apart": ("auto", {"agree": False}),
}
"""The engines of a comparison, by dtype of the KV cache and by the plugin's options.

Baselines first: stock vLLM, and stock vLLM with a cache of half the size.
"""


CHUNKS = (256, 512, 1024, 2048, 4096)
"""Of the prompts whose first tokens are timed."""


@dataclass(frozen=True)
class Workload:
    """One row of figures for each memory size, variant and batch.

    The batches share an engine, which is made for the longest and the largest of them.

    Attributes:
        about: What it shows.
        model: Folder of `benchmarks/models`.
        batches: What is served, one after another.
        budget: Tokens kept per sequence.
        stride: Tokens evicted at a time; None: the plugin's default at the budget.
        chunk: Prompt tokens per step; None: likewise.
        variants: Keys of `VARIANTS`.
        gpu_memory_utilization: vLLM's option, one figure for each.
        kv_cache_bytes: KV memory of every variant on each GPU; None: what the option
            above leaves.
        tensor_parallel_size: GPUs that share the heads of each layer.
        one_at_a_time: Whether a batch's latency is measured, not its throughput.
    """

    about: str
    model: str
    batches: tuple[Requests, ...]
    budget: int
    stride: int | None = None
    chunk: int | None = None
    variants: tuple[str, ...] = ("stock", "recent", "roco")
    gpu_memory_utilization: tuple[float, ...] = (0.9,)
    kv_cache_bytes: int | None = None
    tensor_parallel_size: int = 1
    one_at_a_time: bool = False

    def config(self, options: Mapping[str, Any]) -> RocoConfig:
        """Return the plugin's options, beside those of size."""
        sizes = {"budget": self.budget, "stride": self.stride, "chunk": self.chunk}
        return RocoConfig(**{**sizes, **options})

    def engine(self, variant: str, **options: Any) -> Engine:
        """Return the engine of a variant.

        Args:
            variant: Key of `VARIANTS`.
            **options: Fields of `Engine`, in the place of the workload's.
        """
        kv_cache_dtype, roco = VARIANTS[variant]
        return Engine(
            **{
                "model": self.model,
                # all of them, whichever are selected: a row means the same alone
                "batches": self.batches,
                "roco": None if roco is None else self.config(roco),
                "kv_cache_dtype": kv_cache_dtype,
                "kv_cache_bytes": self.kv_cache_bytes,
                "tensor_parallel_size": self.tensor_parallel_size,
                **options,
            }
        )


QWEN_BYTES_PER_TOKEN = 28 * 4 * 2 * 128 * 2
"""Layers, kv heads, K and V, head size, bytes of a number."""

WORKLOADS = {
    "r-kv-stress": Workload(
        about="the stress test that a port of R-KV to vLLM publishes",
        model="qwen2.5-7b",
        batches=(Requests(256, 700, 1024),),
        budget=256,
        stride=128,
        # a prompt in two steps
        chunk=512,
        variants=("stock", "stock-fp8", "recent", "roco", "roco-fp8"),
        gpu_memory_utilization=(0.5, 0.4, 0.3, 0.25),
    ),
    "no-pressure": Workload(
        about="every sequence fits and none reaches its budget: what RoCo costs",
        model="qwen2.5-7b",
        batches=(Requests(256, 700, 1024),),
        budget=2048,
        stride=128,
        variants=("stock", "roco"),
    ),
    "long-prompts": Workload(
        about="16K tokens to read for 512 to write",
        model="qwen2.5-7b",
        batches=(Requests(32, 16384, 512),),
        budget=2048,
        gpu_memory_utilization=(0.9, 0.5),
    ),
    "long-generation": Workload(
        about="8K tokens to write, KV memory for 12 full sequences",
        model="qwen2.5-7b",
        batches=(Requests(64, 512, 8192),),
        budget=1024,
        variants=("stock", "stock-fp8", "recent", "roco", "roco-fp8"),
        # and vLLM's null block
        kv_cache_bytes=(12 * (512 + 8192) + 16) * QWEN_BYTES_PER_TOKEN,
    ),
    "crossover": Workload(
        about="from which length on a budget pays, at a fixed memory",
        model="llama-3.1-8b",
        batches=tuple(
            Requests(max(8, min(128, 131072 // length)), length - 256, 256)
            for length in (1024, 2048, 4096, 8192, 16384, 32768)
        ),
        budget=1024,
        variants=("stock", "roco"),
        # weights, and what two of the longest sequences need
        gpu_memory_utilization=(0.35,),
    ),
    "batch-1": Workload(
        about="one request at a time, below the budget and far above it",
        model="llama-3.1-8b",
        batches=(Requests(1, 1024, 256), Requests(1, 16384, 256)),
        budget=2048,
        variants=("stock", "roco"),
        one_at_a_time=True,
    ),
    "smoke": Workload(
        about="seconds on any machine: whether the benchmark itself works",
        model="smollm2-135m",
        batches=(Requests(4, 64, 32), Requests(2, 320, 64)),
        budget=64,
        stride=16,
        chunk=32,
        variants=("stock", "roco"),
        gpu_memory_utilization=(0.3,),
        kv_cache_bytes=2**26,
    ),
}


def _on_two_gpus(name: str, about: str, **changes: Any) -> Workload:
    """Return a workload that two tensor-parallel GPUs serve."""
    defaults: dict[str, Any] = {
        "variants": ("stock", "roco"),
        "gpu_memory_utilization": (0.9,),
        "kv_cache_bytes": 2 * 2**30,
    }
    shared = replace(WORKLOADS[name], about=about, tensor_parallel_size=2)
    return replace(shared, **defaults | changes)


WORKLOADS |= {
    "stress-two-gpus": _on_two_gpus(
        "r-kv-stress", "the stress test on two GPUs, KV memory for 43 full sequences"
    ),
    "generation-two-gpus": _on_two_gpus(
        "long-generation",
        "8K tokens to write on two GPUs, KV memory for 12 full sequences",
        kv_cache_bytes=(12 * (512 + 8192) + 16) * QWEN_BYTES_PER_TOKEN // 2,
    ),
    "70b-two-gpus": _on_two_gpus(
        "r-kv-stress",
        "a 70B model on two GPUs, KV memory for ten full sequences",
        model="llama-3.1-70b",
        batches=(Requests(64, 700, 512),),
        variants=("stock", "roco", "roco-apart"),
    ),
}


@dataclass(frozen=True)
class Run:
    """One batch that an engine serves.

    Attributes:
        name: Key of `WORKLOADS`.
        requests: The batch.
        engine: What serves it.
        number: Of the round, from 1.
    """

    name: str
    requests: Requests
    engine: Engine
    number: int = 1

    @property
    def columns(self) -> dict[str, object]:
        """The columns of `serving.csv` that tell this run from others."""
        told = {"workload": self.name, "round": self.number}
        return {**told, **self.engine.columns, **self.requests.columns}


def runs(
    name: str,
    *,
    variants: list[str] | None = None,
    gpu_memory_utilization: list[float] | None = None,
    input_lens: list[int] | None = None,
    model: str | None = None,
    baseline: str = "FLASH_ATTN",
    rounds: int = 1,
) -> list[Run]:
    """Return a workload's runs, the engines of each memory size one after another.

    Args:
        name: Key of `WORKLOADS`.
        variants: Keys of `VARIANTS`; None: the workload's.
        gpu_memory_utilization: Instead of the workload's.
        input_lens: Leaves out the batches with other prompts.
        model: Folder of `benchmarks/models`; None: the workload's.
        baseline: The attention backend of stock vLLM.
        rounds: How often each engine is started and has its turn.
    """
    workload = WORKLOADS[name]
    options = {"stock": baseline, "model": model or workload.model}
    return [
        Run(
            name,
            requests,
            workload.engine(variant, gpu_memory_utilization=memory, **options),
            number,
        )
        for number in range(1, rounds + 1)
        for memory in gpu_memory_utilization or workload.gpu_memory_utilization
        for variant in variants or workload.variants
        for requests in workload.batches
        if input_lens is None or requests.input_len in input_lens
    ]
