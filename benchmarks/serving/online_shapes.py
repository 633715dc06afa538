# SPDX-License-Identifier: Apache-2.0
"""Requests that arrive one by one, the limits that they keep, and who serves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from math import ceil
from typing import Any

from benchmarks.serving.engines import Engine, Requests
from benchmarks.serving.request_shapes import RequestShape, SideRun, grouped
from vllm_roco.config import RocoConfig

MAX_NUM_SEQS = 256
"""Requests that run at once at most, on every side."""
AT_ONCE = float("inf")
"""The rate of requests that all arrive together."""


@dataclass(frozen=True)
class Side:
    """An engine of the comparison; every other flag is that of the others.

    Attributes:
        about: What a reader calls it.
        kv_cache_dtype: `auto` is the model's.
        roco: The plugin's options beside the budget; None for stock vLLM.
    """

    about: str
    kv_cache_dtype: str = "auto"
    roco: Mapping[str, Any] | None = None


SIDES = {
    "stock": Side("FLASH_ATTN"),
    "stock-fp8": Side("FLASH_ATTN, fp8 KV cache", "fp8"),
    "roco": Side("roco", roco={}),
    "roco-fp8": Side("roco, fp8 KV cache", "fp8", roco={}),
    # more than any step has, so that no prompt waits for another one's end
    "roco-side-by-side": Side(
        "roco, prompts side by side", roco={"prefill_tokens": 2**20}
    ),
}
"""The baseline first."""
DEFAULT_SIDES = ("stock", "stock-fp8", "roco")


@dataclass(frozen=True, kw_only=True)
class Shape(RequestShape):
    """Requests that arrive at a rate, behind prefixes that have been read before.

    Attributes:
        input_len: Mean tokens of a prompt, without its prefix; `output_len` is a mean,
            too.
        spread: Standard deviation of the logarithms of both lengths; 0: all are equal.
        fresh_share: Share of the requests whose prefix is one that nobody has read.
        ttft_ms: Most milliseconds to a request's first token.
        tpot_ms: Most milliseconds for each later one, in the mean of a request.
        rate: Requests a second that are tried first; `AT_ONCE`: the only one.
        least_seconds: How long they go on arriving at least, by more requests than
            `num_requests` where they come fast: a queue takes time to grow.
        memory: KV memory in bytes by name: `scarce` is what a card of 24 GB leaves
            beside the weights, `scarcer` a GiB less, `ample` has room for all that
            runs.
        budget: RoCo's.
    """

    input_len: int
    spread: float = 0.0
    fresh_share: float = 0.05
    ttft_ms: int
    tpot_ms: int
    rate: float
    least_seconds: int = 20
    memory: Mapping[str, int] = field(
        default_factory=lambda: {"ample": 32 * 2**30, "scarce": 5 * 2**30}
    )
    budget: int = 2048

    def at(self, rate: float) -> Shape:
        """Return the requests that are asked at a rate."""
        if rate == AT_ONCE:
            return self
        count = ceil(rate * self.least_seconds)
        return replace(self, num_requests=max(self.num_requests, count))

    @property
    def longest(self) -> tuple[int, int]:
        """Most tokens of a prompt, prefix included, and most to write."""
        scale = 4 if self.spread else 1
        return self.prefix_len + scale * self.input_len, scale * self.output_len

    @property
    def requests(self) -> Requests:
        """What an engine must have room for."""
        return Requests(min(MAX_NUM_SEQS, self.num_requests), *self.longest)

    @property
    def columns(self) -> dict[str, object]:
        """The columns of a row that tell the requests from others."""
        lengths = (
            *("num_requests", "least_seconds", "input_len", "output_len"),
            "spread",
        )
        limits = {f"{name}_limit": getattr(self, name) for name in _LIMITS}
        return {**self.named(*lengths, "prefix_len", "num_prefixes"), **limits}


_LIMITS = ("ttft_ms", "tpot_ms")

SHAPES = {
    "chat": Shape(
        about="a question and its answer",
        input_len=500,
        output_len=300,
        spread=0.6,
        ttft_ms=500,
        tpot_ms=40,
        num_requests=200,
        rate=30,
        memory={"ample": 16 * 2**30, "scarce": 5 * 2**30},
    ),
    "long-document": Shape(
        about="16K tokens to read for 256 to write",
        input_len=16384,
        output_len=256,
        ttft_ms=3000,
        tpot_ms=50,
        num_requests=40,
        rate=1.25,
        memory={"ample": 32 * 2**30, "scarce": 5 * 2**30, "scarcer": 4 * 2**30},
    ),
    "reasoning": Shape(
        about="6K tokens to write",
        input_len=500,
        output_len=6144,
        ttft_ms=1000,
        tpot_ms=25,
        num_requests=40,
        rate=0.5,
    ),
    "reasoning-short": Shape(
        about="1.5K tokens to write, a quarter, with a quarter of budget and memory",
        input_len=500,
        output_len=1536,
        ttft_ms=1000,
        tpot_ms=25,
        num_requests=60,
        rate=2,
        memory={"scarce": 5 * 2**28},
        budget=512,
    ),
    "agent": Shape(
        about="four system prompts of 8K tokens, which 95 % of the requests begin with",
        input_len=500,
        output_len=300,
        prefix_len=8192,
        num_prefixes=4,
        ttft_ms=1500,
        tpot_ms=40,
        num_requests=100,
        rate=12,
    ),
    "many-long-prompts": Shape(
        about="32 prompts of 16K tokens, all at once: whose first token comes when",
        input_len=16384,
        output_len=128,
        ttft_ms=30000,
        tpot_ms=1000,
        num_requests=32,
        rate=AT_ONCE,
        memory={"ample": 32 * 2**30},
    ),
    "online-smoke": Shape(
        about="seconds on any machine: whether the benchmark itself works",
        input_len=48,
        output_len=8,
        spread=0.3,
        # a block of vLLM's on a CPU
        prefix_len=128,
        num_prefixes=2,
        fresh_share=0.25,
        ttft_ms=60000,
        tpot_ms=60000,
        num_requests=8,
        rate=4,
        least_seconds=1,
        memory={"scarce": 2**26},
        budget=64,
        model="smollm2-135m",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Run(SideRun):
    """A sweep of the rate: one shape, asked of one engine.

    Attributes:
        name: Key of `SHAPES`; `side` is one of `SIDES`.
        shape: The same, perhaps with other lengths.
        memory: Name of the KV memory.
    """

    shape: Shape
    memory: str

    @property
    def columns(self) -> dict[str, object]:
        """The columns of `serving_online.csv` that tell this run from others."""
        names = {"shape": self.name, "memory": self.memory, "side": self.side}
        return {
            **names,
            **{"round": self.number, "max_num_seqs": self.engine.batches[0].count},
            **self.engine.columns,
            **self.shape.columns,
        }


def online_runs(
    names: Sequence[str],
    sides: Sequence[str] = DEFAULT_SIDES,
    *,
    rounds: int = 1,
    baseline: str = "FLASH_ATTN",
    gpu_memory_utilization: float = 0.9,
    num_requests: Sequence[int] = (),
    other: Mapping[str, Any] | None = None,
    kv_cache_bytes: Mapping[str, int] | None = None,
) -> list[Run]:
    """Return the runs; those of one engine stand together in each round.

    Args:
        names: Keys of `SHAPES`, perhaps with a colon and the name of one KV memory.
        sides: Keys of `SIDES`.
        rounds: How often each engine has its turn.
        baseline: The attention backend of stock vLLM.
        gpu_memory_utilization: Share of the GPU that must be free at the start.
        num_requests: One figure for each name; none: the shapes' own.
        other: Fields of `Shape` in the place of the shapes' own.
        kv_cache_bytes: KV memory by side, in the place of the named one's.

    Raises:
        ValueError: There is no such shape, or it has no such memory.
    """
    asked = [pair for name in names for pair in _memories(name)]
    shapes = {name: replace(SHAPES[name], **dict(other or {})) for name, _ in asked}
    for name, count in zip(names, num_requests, strict=bool(num_requests)):
        shape = name.partition(":")[0]
        shapes[shape] = replace(shapes[shape], num_requests=count)

    def made(name: str, size: str, side: str, number: int) -> Run:
        shape = shapes[name]
        roco = SIDES[side].roco
        options = None if roco is None else RocoConfig(budget=shape.budget, **roco)
        engine = Engine(
            model=shape.model,
            # one that holds every shape serves all of them, whichever are selected
            batches=(_room(shape, [*SHAPES.values(), *shapes.values()]),),
            roco=options,
            stock=baseline,
            kv_cache_dtype=SIDES[side].kv_cache_dtype,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_bytes=(kv_cache_bytes or {}).get(side, shape.memory[size]),
            # vLLM's default
            prefix_caching=True,
        )
        return Run(
            name=name,
            side=side,
            engine=engine,
            number=number,
            shape=shape,
            memory=size,
        )

    every = [
        made(name, size, side, number)
        for number in range(1, rounds + 1)
        for (name, size), side in product(asked, sides)
    ]
    return [*chain(*grouped(every, lambda run: (run.number, run.engine)))]


def side_by_side(runs: Sequence[Run]) -> list[Run]:
    """Return the runs of a shape next to each other, for servers that all live."""
    sides = list(SIDES)
    return [
        run
        for same in grouped(runs, lambda run: (run.number, run.memory, run.name))
        for run in sorted(same, key=lambda run: sides.index(run.side))
    ]


def _memories(name: str) -> list[tuple[str, str]]:
    """Return a shape beside each memory that is meant, such as `chat:ample`."""
    shape, _, size = name.partition(":")
    if shape not in SHAPES:
        raise ValueError(f"no shape {shape!r}. Use one of {', '.join(SHAPES)}.")
    known = SHAPES[shape].memory
    if size and size not in known:
        raise ValueError(f"{shape} has no memory {size!r}. Use {' or '.join(known)}.")
    return [(shape, size)] if size else [(shape, other) for other in known]


def _room(shape: Shape, shapes: Sequence[Shape]) -> Requests:
    """Return requests that need as much room as the longest and most of a model."""
    rooms = [other.requests for other in shapes if other.model == shape.model]
    lengths = max(rooms, key=lambda room: room.input_len + room.output_len)
    return replace(lengths, count=max(room.count for room in rooms))
