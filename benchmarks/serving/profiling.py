# SPDX-License-Identifier: Apache-2.0
"""Where a decode step's time goes: kernel by kernel, idle, and the scheduler's.

vLLM's own profiler records a batch that decodes across the end of a stride. Its traces
are kept, so that they can be read again without a GPU.
"""

from __future__ import annotations

import gzip
import importlib
import json
import pkgutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch.profiler import record_function
from vllm.benchmarks import latency
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from benchmarks import rows
from benchmarks.serving.engines import Requests
from benchmarks.serving.jobs import MACHINE, Session
from benchmarks.serving.shared_engine import await_engine_end
from benchmarks.serving.trace_steps import SCHEDULER, Steps, decode_steps
from benchmarks.serving.vllm_bench import latency_command, parsed
from benchmarks.serving.workloads import Workload
from vllm_roco import ops
from vllm_roco.config import RocoConfig
from vllm_roco.scheduler import RocoAsyncScheduler

DEFAULTS = RocoConfig()
# the stride ends halfway through what is written
REQUESTS = Requests(64, DEFAULTS.budget + DEFAULTS.stride - 20, 40)
WORKLOAD = Workload(
    about="decode steps across the end of a stride",
    model="llama-3.1-8b",
    batches=(REQUESTS,),
    budget=DEFAULTS.budget,
)
# few steps for all prompts, so that the rows keep near together
MAX_NUM_BATCHED_TOKENS = 512 * REQUESTS.count
TOP = 12
"""Kernels with a row of their own; the others share one."""
MOVE = "_move_blocks_kernel"
MACHINE_FILE = "machine.json"
TRACES = "*.pt.trace.json.gz"


class _Annotated:
    """Put before a scheduler class."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        with record_function(f"{SCHEDULER}schedule"):
            return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        with record_function(f"{SCHEDULER}update_from_output"):
            return super().update_from_output(*args, **kwargs)  # type: ignore[misc]


class AnnotatedScheduler(_Annotated, AsyncScheduler):
    """vLLM's own."""


class AnnotatedRocoScheduler(_Annotated, RocoAsyncScheduler):
    """RoCo's."""


SCHEDULERS = {False: AnnotatedScheduler, True: AnnotatedRocoScheduler}
"""Schedulers whose work shows in traces, without RoCo and with it.

vLLM annotates the model's steps, but of the scheduler only parts. The schedulers run in
the thread that starts the profiler, as long as the engine has one GPU.
"""


def profile_command(variant: str, folder: Path, common: Sequence[str]) -> list[str]:
    """Return what `vllm bench latency` is told."""
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder.resolve()),
        "torch_profiler_with_stack": False,
    }
    engine = WORKLOAD.engine(variant)
    return [
        *engine.command(common),
        f"--max-num-batched-tokens={MAX_NUM_BATCHED_TOKENS}",
        f"--scheduler-cls={__name__}.{SCHEDULERS[engine.roco is not None].__name__}",
        "--async-scheduling",
        *latency_command(REQUESTS, warmups=1),
        "--profile",
        f"--profiler-config={json.dumps(profiler)}",
    ]


def split(steps: Steps) -> dict[str, Steps]:
    """Return the ordinary steps and those in which pages are moved."""
    moves = steps.calls[steps.calls["kernel"] == MOVE]
    moving = moves.groupby("step")["us"].sum().reindex(steps.times.index, fill_value=0)
    evicting = moving > 5 * moving.median()
    # prompts that were read later evict later: the fullest step counts
    fullest = evicting & (moving == moving.max())
    parts = {"decode": steps.where(~evicting), "evicting": steps.where(fullest)}
    return {kind: part for kind, part in parts.items() if len(part.times)}


def our_kernels() -> set[str]:
    """Return the names of the kernels in `vllm_roco.ops`."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")
    ]
    return {
        name for module in modules for name in vars(module) if name.endswith("_kernel")
    }


def kernel_rows(steps: Steps) -> pd.DataFrame:
    """Return the kernels of an average step, the costliest first."""
    ours = our_kernels()
    calls = steps.calls.groupby("kernel")["us"].agg(["size", "sum"])
    kernels = (calls / len(steps.times)).set_axis(["calls", "us"], axis=1)
    kernels = kernels.sort_values("us", ascending=False).reset_index()
    is_shown = (kernels.index < TOP) | kernels["kernel"].isin(ours)
    rest = kernels[~is_shown]
    found = kernels[is_shown]
    if len(rest):
        sums = rest[["calls", "us"]].sum()
        found = pd.concat(
            [found, sums.to_frame().T.assign(kernel=f"{len(rest)} others")]
        )
    return pd.DataFrame(
        {
            "kernel": found["kernel"].str[:80],
            "ours": found["kernel"].isin(ours).map({True: "yes", False: "no"}),
            "calls": found["calls"].round(1),
            "us": found["us"].round(2),
            "share": (found["us"] / found["us"].sum()).round(5),
        }
    ).reset_index(drop=True)


def profile(variant: str, folder: Path) -> pd.DataFrame:
    """Return a variant's rows of `profile.csv` from its trace.

    Args:
        variant: Key of `VARIANTS`.
        folder: Where `run` has put the trace.
    """
    facts = json.loads((folder / MACHINE_FILE).read_text())
    with gzip.open(next(folder.glob(TRACES))) as file:
        steps = decode_steps(json.load(file), REQUESTS.count)
    columns = {
        **{column: facts[column] for column in MACHINE},
        "model": WORKLOAD.model,
        "batch": REQUESTS.count,
        "context": REQUESTS.input_len,
        "variant": variant,
    }
    parts = []
    for kind, part in split(steps).items():
        kernels = kernel_rows(part)
        whole = {**columns, "step": kind, **part.times.mean().round(1)}
        parts.append(kernels.assign(**whole)[[*whole, *kernels]])
    return pd.concat(parts)


def run(session: Session, variants: Sequence[str], common: Sequence[str]) -> None:
    """Record what has no trace yet and write `profile.csv` from all traces.

    Traces lie in `traces` of the session's folder, each beside the machine's facts.

    Args:
        session: Where, on which machine, and for how long.
        variants: Keys of `VARIANTS`.
        common: What every engine is told.
    """
    end = time.monotonic() + session.time_limit
    parts: list[pd.DataFrame] = []
    for variant in variants:
        folder = session.out / "traces" / variant
        if not list(folder.glob(TRACES)):
            if time.monotonic() > end:
                print(f"no time left: {variant}", flush=True)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            facts = json.dumps(dict(session.facts), indent=1)
            (folder / MACHINE_FILE).write_text(f"{facts}\n")
            latency.main(parsed(latency, profile_command(variant, folder, common)))
            await_engine_end()
        parts.append(profile(variant, folder))
        rows.write(session.out / "profile.csv", pd.concat(parts))
        facts_of_trace = json.loads((folder / MACHINE_FILE).read_text())
        rows.note(session.out, "profile", {"variant": variant, **facts_of_trace})
