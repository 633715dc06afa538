# SPDX-License-Identifier: Apache-2.0
"""What one call measures: a preset for each table, the most telling cells first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.quality.cells import (
    GENERATION,
    PERPLEXITY,
    PERPLEXITY_GENERATION,
    Setup,
)
from benchmarks.quality.grid import (
    BASE,
    BLOCK_SIZE,
    DEFAULT,
    FULL,
    METHODS,
    ORACLE_METHODS,
    PEAK,
    Preset,
    Sweep,
    against_budget,
    at_budget,
    setup_of,
)
from benchmarks.quality.pace import PACES
from benchmarks.quality.pace import STRIDE as PACE_STRIDE
from benchmarks.quality.policies import BASE as SEARCH_BASE
from benchmarks.quality.policies import POLICIES
from benchmarks.quality.policies import setup as policy_setup
from benchmarks.quality.tasks import HARD_TASKS, RULER_TASKS
from benchmarks.quality.tasks.conversation import RETRIEVAL
from benchmarks.quality.tasks.derivation import DERIVATION, prompt_tokens
from benchmarks.quality.training.trained import DERIVING, TRAINED
from tools.packaged_models import GEMMA_3
from vllm_roco.config import RocoConfig

_HALVES = (0.5, 0.25)
_QUARTERS = (*_HALVES, 0.125)
_SIXTEENTHS = (*_QUARTERS, 0.0625)
REQUESTS = {
    **{mode: (("mode", mode),) for mode in ("both", "prompt", "auto", "generation")},
    "both, h2o": (("policy", "h2o"),),
    "both, random": (("policy", "random"),),
    "generation, random": (("mode", "generation"), ("policy", "random")),
}
"""What requests bring beside a budget that is a fraction of their prompt."""
SWEEPS = (
    Sweep("passkey", 2048, _SIXTEENTHS, 100),
    Sweep("passkey", 4096, _SIXTEENTHS, 100),
    Sweep("needle", 1024, _QUARTERS, 100),
    Sweep("needle", 2048, _QUARTERS, 100),
    Sweep(PERPLEXITY, 2048, _QUARTERS, 100),
    *(Sweep(task, 2048, _QUARTERS, 100) for task in RULER_TASKS),
    Sweep(PERPLEXITY_GENERATION, 2048, _QUARTERS, 100),
    Sweep(GENERATION, 1024, _QUARTERS, 32),
)
"""Accuracy and perplexity against the budget."""
STRIDES = (16, 32, 64, 128, 256, 512)
STRIDE_BUDGET = 256
STRIDE_SWEEPS = tuple(
    sweep
    for sweep in SWEEPS
    if (sweep.task, sweep.context) != ("needle", 1024)
    and sweep.task in ("passkey", "needle", PERPLEXITY)
)
"""The same against the stride, at one budget."""


def _full() -> Iterator[tuple[Sweep, Setup]]:
    yield from ((sweep, FULL) for sweep in SWEEPS)
    # every plugin figure is worth more than the next baseline
    yield from against_budget(SWEEPS, METHODS)
    for method in (DEFAULT, PEAK):
        for sweep in STRIDE_SWEEPS:
            yield from ((sweep, setup) for setup in _at_strides(method))
    yield from _at_longer_chunks(SWEEPS, METHODS)
    for methods, skipped in (
        (ORACLE_METHODS[:2], (GENERATION,)),
        (ORACLE_METHODS[2:], (GENERATION, PERPLEXITY_GENERATION, *RULER_TASKS)),
    ):
        sweeps = [sweep for sweep in SWEEPS if sweep.task not in skipped]
        yield from against_budget(sweeps, methods)
        yield from _at_longer_chunks(sweeps, methods)
    for setup in _at_strides(ORACLE_METHODS[0]):
        yield STRIDE_SWEEPS[0], setup


def _quick() -> Iterator[tuple[Sweep, Setup]]:
    sweeps = (
        Sweep("passkey", 1024, _QUARTERS, 12),
        Sweep("needle", 1024, _HALVES, 6),
        Sweep(PERPLEXITY, 1024, _HALVES, 4),
    )
    yield from ((sweep, FULL) for sweep in sweeps)
    yield from against_budget(sweeps, (DEFAULT, "recent"))
    yield from against_budget(sweeps, ("token-roco",))


def _search(n: int, *further: Sweep) -> Iterator[tuple[Sweep, Setup]]:
    sweeps = (
        Sweep("passkey", 2048, (0.125,), n),
        Sweep("needle", 1024, _HALVES, n),
        Sweep("needle", 2048, _HALVES, n),
        # the novel has no more text
        Sweep(PERPLEXITY, 2048, _HALVES, 48),
        *further,
    )
    for name in POLICIES:
        for sweep in sweeps:
            for ratio in sweep.ratios:
                yield sweep, policy_setup(name, int(ratio * sweep.context))


def _modes() -> Iterator[tuple[Sweep, Setup]]:
    sweeps = (
        Sweep("passkey", 2048, _SIXTEENTHS, 100),
        Sweep("needle", 1024, _QUARTERS, 100),
        Sweep("needle", 2048, _QUARTERS, 100),
    )
    yield from ((sweep, FULL) for sweep in sweeps)
    for sweep in sweeps:
        for ratio in sweep.ratios:
            for method, asked in REQUESTS.items():
                options = (("budget", ratio), *asked)
                # a mode bounds what lives; who stays is another table's question
                base = setup_of(PEAK, 0, BASE.stride, BASE.chunk)
                budget = int(ratio * sweep.context)
                yield (
                    sweep,
                    replace(base, method=method, budget=budget, request=options),
                )


def _fp8() -> Iterator[tuple[Sweep, Setup]]:
    """Yield both caches at every budget: in the same memory, fp8 keeps twice that."""
    sweeps = [sweep for sweep in SWEEPS if sweep.task in ("passkey", "needle")]
    for sweep in sweeps:
        yield sweep, FULL
        yield sweep, _in_fp8(FULL)
    for sweep in sweeps:
        for ratio in sweep.ratios:
            setup = at_budget(DEFAULT, sweep, ratio)
            yield from ((sweep, setup), (sweep, _in_fp8(setup)))


def _in_fp8(setup: Setup) -> Setup:
    method = f"{setup.method}, fp8 cache"
    return replace(setup, method=method, kv_cache_dtype="fp8")


def _windows() -> Iterator[tuple[Sweep, Setup]]:
    sweeps = tuple(Sweep("passkey", context, _HALVES, 100) for context in (2048, 4096))
    yield from ((sweep, FULL) for sweep in sweeps)
    yield from against_budget(sweeps, (DEFAULT, PEAK, "recent"))


def _hard() -> Iterator[tuple[Sweep, Setup]]:
    """Yield what a model is trained for, see `benchmarks.quality.training`."""
    lists = [
        Sweep(task, context, _HALVES, 100)
        for context in (2048, 4096)
        for task in (*HARD_TASKS, "multivalue")
    ]
    again = [
        Sweep(f"{task}, {count} questions", 2048, _HALVES, 100)
        for count in (4, 2)
        for task in RETRIEVAL
    ]
    later = [Sweep(f"{task}, later", 2048, _HALVES, 100) for task in RETRIEVAL]
    sweeps = (*lists, *again, *later)
    eighths = [replace(sweep, ratios=(0.125,)) for sweep in lists]
    baselines = [method for method in ORACLE_METHODS if method != "sink-recent"]
    yield from ((sweep, FULL) for sweep in sweeps)
    # the default and what it replaced, then the others
    for methods in (METHODS[:2], METHODS[2:]):
        yield from _asked_for(against_budget((*sweeps, *eighths), methods))
    yield from _in_one_conversation(again, METHODS)
    yield from against_budget((*lists, *again, *eighths), baselines)
    yield from _in_one_conversation(later, METHODS)
    yield from against_budget(later, baselines)


def _asked_for(
    pairs: Iterable[tuple[Sweep, Setup]],
) -> Iterator[tuple[Sweep, Setup]]:
    """Yield methods of the plugin so that requests ask one server for all of them."""
    for sweep, setup in pairs:
        yield sweep, replace(setup, request=_asked(setup))


def _asked(setup: Setup) -> tuple[tuple[str, Any], ...]:
    names = ["budget", "policy", "stride", "chunk"]
    if setup.shield:
        names += ["shield", "shield_ratio"]
    return tuple((name, getattr(setup, name)) for name in names)


def _written() -> Iterator[tuple[Sweep, Setup]]:
    """Yield answers that need what they say themselves; all hold as many tokens.

    Those are the prompt's, and a share of what is written.
    """
    for context in (3072, 6144):
        prompt = -(-prompt_tokens(context) // BLOCK_SIZE) * BLOCK_SIZE
        sweep = Sweep(DERIVATION, context, (), 100)
        yield sweep, FULL
        for share in _QUARTERS:
            more = int(share * (context - prompt))
            more -= more % BLOCK_SIZE
            stride, chunk = min(BASE.stride, more), BASE.chunk
            for mode, budget in (("generation", more), ("both", prompt + more)):
                for method in (DEFAULT, "recent", "random"):
                    setup = setup_of(method, budget, stride, chunk, engine="vllm")
                    setup = replace(
                        setup,
                        method=f"{mode}, {method}",
                        budget=prompt + more,
                        request=(("mode", mode), *_asked(setup)),
                    )
                    yield sweep, setup
            # arXiv 2609.03430: every head has a sample of its own
            setup = setup_of("random", prompt + more, stride, chunk)
            yield (
                sweep,
                replace(
                    setup,
                    method="generation, random by head",
                    options=(("sink", prompt),),
                ),
            )


def _pace() -> Iterator[tuple[Sweep, Setup]]:
    """Yield every pace at equal peak memory, which stands for the budget."""
    tasks = (*HARD_TASKS, "multivalue", "needle")
    sweeps = [Sweep(task, 2048, (), 100) for task in tasks]
    yield from ((sweep, FULL) for sweep in sweeps)
    for memory in (768, 1280):
        for sweep in sweeps:
            for pace in PACES:
                setup = setup_of(DEFAULT, memory, PACE_STRIDE, BASE.chunk)
                yield (
                    sweep,
                    replace(
                        setup,
                        method=pace,
                        request=(("pace", pace), ("memory", memory)),
                    ),
                )


def _in_one_conversation(
    sweeps: Iterable[Sweep], methods: Sequence[str]
) -> Iterator[tuple[Sweep, Setup]]:
    """Yield methods of the plugin in the oracle, whose state lives on between turns.

    A server gets all that was said with every question and reads it anew.
    """
    for sweep, setup in against_budget(sweeps, methods):
        yield sweep, replace(setup, method=f"{setup.method}, kept", engine="oracle")


def _kvpress() -> Iterator[tuple[Sweep, Setup]]:
    sweep = Sweep("needle", 1024, _HALVES, 16)
    yield sweep, replace(FULL, engine="kvpress")
    for ratio in sweep.ratios:
        for press in ("ObservedAttention", "SnapKV"):
            budget = int(ratio * sweep.context)
            yield (
                sweep,
                Setup(method=press, engine="kvpress", policy=press, budget=budget),
            )


def _at_longer_chunks(
    sweeps: Iterable[Sweep], methods: Sequence[str]
) -> Iterator[tuple[Sweep, Setup]]:
    """Yield the plugin's own defaults where its chunk is longer than that of `BASE`."""
    for sweep in sweeps:
        for ratio in sweep.ratios if sweep.task != PERPLEXITY_GENERATION else ():
            own = RocoConfig(budget=int(ratio * sweep.context))
            if own.chunk > BASE.chunk:
                for method in methods:
                    yield sweep, setup_of(method, own.budget, own.stride, own.chunk)


def _at_strides(method: str) -> Iterator[Setup]:
    """Yield each stride with chunks as long as it, and with the same chunks for all."""
    for stride in STRIDES:
        yield setup_of(method, STRIDE_BUDGET, stride, stride)
    for stride in STRIDES:
        yield setup_of(method, STRIDE_BUDGET, stride, max(STRIDES))


PRESETS = {
    "full": Preset("every figure of docs/quality.md", tuple(_full())),
    "quick": Preset("the same in small, in minutes on two cores", tuple(_quick())),
    "screen": Preset(
        "every policy of `policies` beside the search's base, in the oracle",
        tuple(_search(64)),
        table="search",
        reference=SEARCH_BASE,
        seed=1_000,
    ),
    "confirm": Preset(
        "the policies named by --methods, on problems that nothing was chosen by",
        tuple(
            _search(
                400,
                Sweep("passkey", 2048, (0.25,), 400),
                Sweep("passkey", 4096, (0.125,), 400),
            )
        ),
        table="search",
        reference=SEARCH_BASE,
        seed=20_000,
    ),
    "modes": Preset(
        "every mode at fractions of the prompt, asked of one server by its requests",
        tuple(_modes()),
        table="modes",
    ),
    "fp8": Preset(
        "an fp8 KV cache beside the model's own, with and without a budget",
        tuple(_fp8()),
        table="fp8",
    ),
    "windows": Preset(
        "passkeys in a model most of whose layers have a window",
        tuple(_windows()),
        table="windows",
        model=GEMMA_3,
    ),
    "hard": Preset(
        "tasks that a model is trained for, second questions",
        tuple(_hard()),
        table="hard",
        model=TRAINED,
    ),
    "written": Preset(
        "answers that need what they say themselves, with and without the prompt",
        tuple(_written()),
        table="written",
        model=DERIVING,
    ),
    "pace": Preset(
        "how many tokens are read at a time, at equal peak memory",
        tuple(_pace()),
        table="pace",
        model=TRAINED,
    ),
    "kvpress": Preset(
        "needles with kvpress, in an environment of its own: see `with_kvpress`",
        tuple(_kvpress()),
        table="kvpress",
    ),
}
"""Seeds below `FIRST_REPORT_SEED` are for tuning: a report reads other problems."""
