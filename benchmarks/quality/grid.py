# SPDX-License-Identifier: Apache-2.0
"""Which cells there are, the most telling ones first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.quality.cells import (
    GENERATION,
    PERPLEXITY,
    PERPLEXITY_GENERATION,
    Cell,
    Job,
    Setup,
)
from benchmarks.quality.tasks import RULER_TASKS
from vllm_roco.config import SHIELDS, RocoConfig

BASE = RocoConfig(chunk=512)
"""What is not swept, cut to the budget where that is less.

The default but for the chunk: its 1,024 tokens are half of most texts here. Budgets
that are large enough for it have a cell with it, too.
"""
BLOCK_SIZE = 16
PAPER_SHIELD_RATIO = 0.3
"""Of the deviation shield, arXiv 2402.06262."""
ORACLE_METHODS = ("token-roco", "sink-recent", "tova", "h2o", "random")
LEAST_FULL_ACCURACY = 0.3
"""A task of which the full cache solves less says nothing about eviction."""

FULL = Setup(method="full", engine="vllm", policy="full")


@dataclass(frozen=True)
class Sweep:
    """A task at one context, and the shares of it that are kept."""

    task: str
    context: int
    ratios: tuple[float, ...]
    n: int


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        name: As the command line calls it.
        sweeps: Accuracy and perplexity against the budget.
        stride_budget: Budget at which the stride is varied.
        strides: Tokens evicted at a time; empty for no such sweep.
        stride_sweeps: Tasks of which the stride is varied; ratios are not used.
        methods: The plugin's.
        oracle_methods: The oracle's.
    """

    name: str
    sweeps: tuple[Sweep, ...]
    stride_budget: int
    strides: tuple[int, ...]
    stride_sweeps: tuple[Sweep, ...]
    methods: tuple[str, ...]
    oracle_methods: tuple[str, ...]


_QUARTERS = (0.5, 0.25, 0.125)
_SIXTEENTHS = (*_QUARTERS, 0.0625)
_SHIELDS = tuple(f"roco/{shield}" for shield in SHIELDS)

PRESETS = {
    "full": Preset(
        name="full",
        sweeps=(
            Sweep("passkey", 2048, _SIXTEENTHS, 100),
            Sweep("passkey", 4096, _SIXTEENTHS, 100),
            Sweep("needle", 1024, _QUARTERS, 100),
            Sweep("needle", 2048, _QUARTERS, 100),
            Sweep(PERPLEXITY, 2048, _QUARTERS, 100),
            *(Sweep(task, 2048, _QUARTERS, 100) for task in RULER_TASKS),
            Sweep(PERPLEXITY_GENERATION, 2048, _QUARTERS, 100),
            Sweep(GENERATION, 1024, _QUARTERS, 32),
        ),
        stride_budget=256,
        strides=(16, 32, 64, 128, 256, 512),
        stride_sweeps=(
            Sweep("passkey", 2048, (), 100),
            Sweep("passkey", 4096, (), 100),
            Sweep("needle", 2048, (), 100),
            Sweep(PERPLEXITY, 2048, (), 100),
        ),
        methods=(*_SHIELDS, "recent"),
        oracle_methods=ORACLE_METHODS,
    ),
    "quick": Preset(
        name="quick",
        sweeps=(
            Sweep("passkey", 1024, _QUARTERS, 12),
            Sweep("needle", 1024, _QUARTERS[:2], 6),
            Sweep(PERPLEXITY, 1024, _QUARTERS[:2], 4),
        ),
        stride_budget=128,
        strides=(),
        stride_sweeps=(),
        methods=("roco/peak", "recent"),
        oracle_methods=("token-roco",),
    ),
}


def setup_of(method: str, budget: int, stride: int, chunk: int) -> Setup:
    """Return a method of the plugin or of the oracle with its numbers."""
    policy, _, shield = method.partition("/")
    ratio = BASE.shield_ratio if shield == BASE.shield else PAPER_SHIELD_RATIO
    is_oracle = method in ORACLE_METHODS
    return Setup(
        method=method,
        engine="oracle" if is_oracle else "vllm",
        policy=policy,
        shield=shield,
        shield_ratio=ratio if shield else 0.0,
        budget=budget,
        stride=stride,
        chunk=chunk,
        block_size=1 if is_oracle else BLOCK_SIZE,
    )


def cells(preset: Preset, *, model: str, seed: int, n: int | None) -> list[Cell]:
    """Return a preset's cells, each once.

    Args:
        preset: How much is measured.
        model: Name of the model's folder.
        seed: Of every task.
        n: Most problems a cell; None for the preset's.
    """

    def cell(sweep: Sweep, setup: Setup) -> Cell:
        count = sweep.n if n is None else min(n, sweep.n)
        return Cell(
            task=sweep.task,
            context=sweep.context,
            n=count,
            seed=seed,
            model=model,
            setup=setup,
        )

    found = [cell(sweep, FULL) for sweep in preset.sweeps]
    # every plugin figure is worth more than the next baseline
    for methods, skipped in (
        (preset.methods, ()),
        (preset.oracle_methods[:2], (GENERATION,)),
        (preset.oracle_methods[2:], (GENERATION, PERPLEXITY_GENERATION, *RULER_TASKS)),
    ):
        for sweep in preset.sweeps:
            if sweep.task in skipped:
                continue
            found += [
                cell(sweep, _at_budget(method, sweep, ratio))
                for ratio in sweep.ratios
                for method in methods
            ]
        if methods is preset.methods:
            for sweep in preset.stride_sweeps:
                found += [
                    cell(sweep, setup) for setup in _at_strides("roco/peak", preset)
                ]
        for sweep in preset.sweeps:
            if sweep.task not in (*skipped, PERPLEXITY_GENERATION):
                found += [
                    cell(sweep, setup_of(method, c.budget, c.stride, c.chunk))
                    for c in _longer_chunks(sweep)
                    for method in methods
                ]
    for sweep in preset.stride_sweeps[:1]:
        for method in preset.oracle_methods[:1]:
            found += [cell(sweep, setup) for setup in _at_strides(method, preset)]
    return list(dict.fromkeys(found))


def _at_budget(method: str, sweep: Sweep, ratio: float) -> Setup:
    budget = int(ratio * sweep.context)
    stride, chunk = min(BASE.stride, budget), min(BASE.chunk, budget)
    if sweep.task == PERPLEXITY_GENERATION:
        chunk = min(stride, chunk)
    return setup_of(method, budget, stride, chunk)


def _longer_chunks(sweep: Sweep) -> Iterator[RocoConfig]:
    """Yield the plugin's own defaults where its chunk is longer than that of `BASE`."""
    for ratio in sweep.ratios:
        config = RocoConfig(budget=int(ratio * sweep.context))
        if config.chunk > BASE.chunk:
            yield config


def _at_strides(method: str, preset: Preset) -> Iterator[Setup]:
    """Yield each stride with chunks as long as it, and with the same chunks for all."""
    budget = preset.stride_budget
    longest = max(preset.strides, default=0)
    for stride in preset.strides:
        yield setup_of(method, budget, stride, stride)
    for stride in preset.strides:
        yield setup_of(method, budget, stride, longest)


def jobs(wanted: Iterable[Cell]) -> list[Job]:
    """Group cells into processes, in the order of their first cell.

    An engine of vLLM has one setup and takes long to start, so its cells share it. The
    full cache has the most to do and everything waits for it: a context each. The
    oracle takes any setup at any time: a method and context each.
    """
    groups: dict[object, list[Cell]] = {}
    for cell in wanted:
        key: object = cell.setup
        if cell.setup == FULL:
            key = (cell.setup, cell.context, cell.task in RULER_TASKS)
        elif cell.setup.engine == "oracle":
            key = (cell.setup.method, cell.context)
        groups.setdefault(key, []).append(cell)
    return [Job(tuple(group)) for group in groups.values()]
