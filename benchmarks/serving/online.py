# SPDX-License-Identifier: Apache-2.0
"""Goodput: how many requests a second a server answers within their limits.

Fills `serving_online.csv`, a row for each rate that a server is asked at.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.rows import Row, Table
from benchmarks.serving.counters import cached_and_preempted
from benchmarks.serving.engines import Engine
from benchmarks.serving.jobs import Measurement, Session
from benchmarks.serving.online_client import ask
from benchmarks.serving.online_servers import Servers
from benchmarks.serving.online_shapes import AT_ONCE, Run, online_runs, side_by_side
from benchmarks.serving.rate_search import SHARE, next_rate
from benchmarks.serving.request_shapes import grouped

TABLE = Table(
    "serving_online",
    key=(
        *("shape", "memory", "side", "round", "model", "kv_cache_bytes"),
        *("max_num_seqs", "backend", "kv_cache_dtype", "policy", "shield"),
        *("budget", "stride", "chunk", "prefill_tokens"),
        *("num_requests", "least_seconds", "input_len", "output_len", "spread"),
        *("prefix_len", "num_prefixes", "ttft_ms_limit", "tpot_ms_limit", "rate"),
    ),
    results=(
        *("num_asked", "good_share", "goodput", "seconds", "output_tok_s"),
        *("ttft_ms", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "ttft_max_ms"),
        *("tpot_ms", "tpot_p50_ms", "tpot_p90_ms", "tpot_p99_ms", "itl_p99_ms"),
        *("max_in_flight", "hit_rate", "preemptions"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which rates are asked.

    Attributes:
        rates: These; None: those that lead to the largest one that is kept.
        share: Share of the requests that must keep their limits.
        precision: Ratio at which the search ends, as `next_rate` has it.
    """

    rates: tuple[float, ...] | None = None
    share: float = SHARE
    precision: float = 1.1

    def next(self, run: Run, known: pd.DataFrame) -> float:
        """Return the next rate, or 0 for none.

        Args:
            run: The sweep.
            known: Its rows so far.
        """
        kept = {
            float(rate): bool(good >= self.share)
            for rate, good in zip(
                known.get("rate", []), known.get("good_share", []), strict=True
            )
        }
        first = run.shape.rate
        given = (first,) if first == AT_ONCE else self.rates
        if given is None:
            return next_rate(kept, first, self.precision)
        return next((rate for rate in given if rate not in kept), 0)


def run(
    session: Session,
    options: Namespace,
    tokenizer: str,
    common: Sequence[str],
) -> int:
    """Measure what the command line asks for; return how much failed."""
    fields = ("least_seconds", "input_len", "output_len", "budget")
    given = {name: getattr(options, name) for name in fields}
    sizes = [round(gib * 2**30) for gib in _each(options.kv_cache_gib, options.sides)]
    runs = online_runs(
        options.shapes,
        options.sides,
        rounds=options.rounds,
        baseline=options.baseline,
        gpu_memory_utilization=options.gpu_memory_utilization,
        num_requests=_each(options.num_requests, options.shapes),
        other={name: value for name, value in given.items() if value is not None},
        kv_cache_bytes=dict(zip(options.sides, sizes, strict=bool(sizes))),
    )
    together: list[Engine] = []
    if options.together:
        runs = side_by_side(runs)
        together = list(dict.fromkeys(run.engine for run in runs))
    rates = options.rates and tuple(options.rates)
    plan = Plan(rates=rates, share=options.share, precision=options.precision)
    with Servers(common, tokenizer, together) as servers:
        known = partial(session.known, TABLE)
        return session.run(TABLE, jobs(runs, plan, servers, known))


def jobs(
    runs: Sequence[Run],
    plan: Plan,
    servers: Servers,
    known: Callable[[Row], pd.DataFrame],
) -> Iterator[Iterator[Measurement]]:
    """Yield each run's measurements, of which each depends on those before.

    Servers that live together are asked in turns: a search that is cut short has told
    as much of one as of the other.

    Args:
        runs: The sweeps.
        plan: Which rates.
        servers: Who is asked.
        known: Returns the rows that have some columns, those just measured included.
    """

    def beside(run: Run) -> Hashable:
        if run.engine not in servers.together:
            return id(run)
        return run.number, run.memory, run.name

    for same in tqdm(grouped(runs, beside), "sweeps"):
        yield _in_turns([_sweep(run, plan, servers, known) for run in same])


def measure(run: Run, rate: float, servers: Servers) -> dict[str, object]:
    """Ask a run's server at a rate; return the columns that the answers fill.

    Raises:
        RuntimeError: The server does not start, or an answer is missing.
    """
    server = servers.ready(run)
    before = server.metrics()
    # every rate and round has requests of its own, and every side the same
    seeds = np.random.SeedSequence([run.number, round(1e3 * min(rate, 1e6))])
    seed = int(seeds.generate_state(1)[0])
    shape = run.shape.at(rate)
    found = ask(server.url, shape, rate, seed, servers.tokenizer)
    after = server.metrics()
    seconds, count = float(found["duration"]), shape.num_requests
    times = {
        column: round(float(found[f"{_TIMES[time]}_{name}_ms"]), 2)
        for column in TABLE.results
        if (named := _TIME.fullmatch(column))
        for name, time in [named.groups()]
    }
    return {
        "num_asked": count,
        "good_share": round(found["request_goodput"] * seconds / count, 4),
        "goodput": round(found["request_goodput"], 4),
        "seconds": round(seconds, 2),
        "output_tok_s": round(found["output_throughput"], 1),
        **times,
        "max_in_flight": int(found["max_concurrent_requests"]),
        **cached_and_preempted(before, after),
    }


def _each(figures: list[float] | None, names: Sequence[str]) -> list[Any]:
    """Return a figure for each name; one stands for all of them."""
    given = figures or []
    return given * len(names) if len(given) == 1 else given


_TIME = re.compile("(ttft|tpot|itl)(.*)_ms")
_TIMES = {"": "mean", "_p50": "p50", "_p90": "p90", "_p99": "p99", "_max": "p100"}
"""By a column's end, what vLLM calls that of all requests."""


def _sweep(
    run: Run, plan: Plan, servers: Servers, known: Callable[[Row], pd.DataFrame]
) -> Iterator[Measurement]:
    found = known(run.columns)
    while rate := plan.next(run, found):
        yield {**run.columns, "rate": rate}, partial(measure, run, rate, servers)
        before, found = len(found), known(run.columns)
        if len(found) == before:
            # it failed, or no time is left
            return


def _in_turns(sweeps: Sequence[Iterator[Measurement]]) -> Iterator[Measurement]:
    left = list(sweeps)
    while left:
        for sweep in tuple(left):
            measurement = next(sweep, None)
            if measurement is None:
                left.remove(sweep)
            else:
                yield measurement
