# SPDX-License-Identifier: Apache-2.0
"""What a cell may be, and which process measures it; `presets` has them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.quality.cells import PERPLEXITY_GENERATION, Cell, Job, Setup
from benchmarks.quality.tasks import CONVERSATIONS, FIRST_REPORT_SEED, RULER_TASKS
from benchmarks.quality.tasks.derivation import DERIVATION
from tools.packaged_models import SMOLLM2
from vllm_roco.config import SHIELDS, RocoConfig

BASE = RocoConfig(chunk=512)
"""What is not swept, cut to the budget where that is less.

The default but for the chunk: its 1,024 tokens are half of most texts here. Budgets
that are large enough for it have a cell with it, too.
"""
BLOCK_SIZE = 16
SHIELD_RATIOS = {
    BASE.shield: BASE.shield_ratio,
    # the default until contributions were measured
    "peak": 0.7,
    # arXiv 2402.06262
    "deviation": 0.3,
}
"""Of the budget, what each shield puts out of reach."""
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
    """What one call measures.

    Attributes:
        about: What it shows.
        pairs: What is measured under which setups, the most telling ones first.
        table: Name of the file that its rows go to.
        reference: The method without which the others tell nothing.
        seed: Of every task.
        model: One of `tools.packaged_models`, or of `ADAPTERS`.
    """

    about: str
    pairs: Sequence[tuple[Sweep, Setup]]
    table: str = "quality"
    reference: str = FULL.method
    seed: int = FIRST_REPORT_SEED
    model: str = SMOLLM2


DEFAULT = f"{BASE.policy}/{BASE.shield}"
"""The method that a user gets who only sets a budget."""
PEAK = "roco/peak"
"""The default before contributions were measured."""
METHODS = (*(f"roco/{shield}" for shield in SHIELDS), "recent")
"""The plugin's, its default first."""


def setup_of(
    method: str, budget: int, stride: int, chunk: int, *, engine: str = ""
) -> Setup:
    """Return a method of the plugin or of the oracle with its numbers.

    Args:
        method: One of `METHODS`, `ORACLE_METHODS` or a policy of the plugin.
        budget: See `Setup`.
        stride: Likewise.
        chunk: Likewise.
        engine: Of a policy that both have; the oracle by default.
    """
    policy, _, shield = method.partition("/")
    is_oracle = method in ORACLE_METHODS and engine != "vllm"
    return Setup(
        method=method,
        engine="oracle" if is_oracle else "vllm",
        policy=policy,
        shield=shield,
        shield_ratio=SHIELD_RATIOS.get(shield, 0.0),
        budget=budget,
        stride=stride,
        chunk=chunk,
        block_size=1 if is_oracle else BLOCK_SIZE,
    )


def cells(preset: Preset, *, model: str, seed: int, n: int | None) -> list[Cell]:
    """Return a preset's cells, each once.

    Args:
        preset: What is measured.
        model: Name of the model's folder.
        seed: Of every task.
        n: Most problems a cell; None for the preset's.
    """
    found = (
        Cell(
            task=sweep.task,
            context=sweep.context,
            n=sweep.n if n is None else min(n, sweep.n),
            seed=seed,
            model=model,
            setup=setup,
        )
        for sweep, setup in preset.pairs
    )
    return list(dict.fromkeys(found))


def against_budget(
    sweeps: Iterable[Sweep], methods: Sequence[str]
) -> Iterator[tuple[Sweep, Setup]]:
    """Yield methods, as `setup_of` has them, at each budget of some sweeps."""
    for sweep in sweeps:
        for ratio in sweep.ratios:
            for method in methods:
                yield sweep, at_budget(method, sweep, ratio)


def at_budget(method: str, sweep: Sweep, ratio: float) -> Setup:
    """Return a method, as `setup_of` has it, that keeps a share of a sweep's text."""
    budget = int(ratio * sweep.context)
    stride, chunk = min(BASE.stride, budget), min(BASE.chunk, budget)
    if sweep.task == PERPLEXITY_GENERATION:
        chunk = min(stride, chunk)
    return setup_of(method, budget, stride, chunk)


def jobs(wanted: Iterable[Cell]) -> list[Job]:
    """Group cells into processes, in the order of their first cell.

    An engine of vLLM has one setup and takes long to start, so its cells share it.
    Where requests bring what differs, each task at each context has one for all of
    them. The full cache has the most to do and everything waits for it: a context
    each, and each form of conversation apart. Other engines take any setup at any
    time: a context each, too, and conversations apart.
    """
    groups: dict[object, list[Cell]] = {}
    for cell in wanted:
        key: object = cell.setup
        if cell.setup == FULL:
            _, _, form = cell.task.partition(", ")
            key = (cell.setup, cell.context, cell.task in RULER_TASKS, form)
        elif cell.setup.request:
            # long answers take long, and paces are many
            is_long = cell.task == DERIVATION or "pace" in dict(cell.setup.request)
            apart = cell.setup.budget, dict(cell.setup.request).get("mode")
            kind = cell.context, cell.task, apart if is_long else None
            key = (_server_of(cell.setup), kind)
        elif cell.setup.engine != "vllm":
            # conversations take long, and are many
            key = (cell.setup.engine, cell.context, cell.task in CONVERSATIONS)
        groups.setdefault(key, []).append(cell)
    return list(groups.values())


def _server_of(setup: Setup) -> Setup:
    """Return what is left of a setup without what its requests bring."""
    plain = Setup(method="", engine=setup.engine, policy=BASE.policy)
    brought = {"method", "budget", "request", *dict(setup.request)}
    names = brought & Setup.__annotations__.keys()
    return replace(setup, **{name: getattr(plain, name) for name in names})
