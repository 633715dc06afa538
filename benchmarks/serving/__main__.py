# SPDX-License-Identifier: Apache-2.0
r"""What the budget buys in serving, measured with vLLM's own benchmarks.

    python -m benchmarks.serving r-kv-stress --out benchmarks/results
    python -m benchmarks.serving prefill --out benchmarks/results --time-limit 300 \
        -- --compilation-config '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'

Every engine is vLLM's, loaded with a model's shape and random weights, which do not
change what attention costs. Rows are appended as soon as they are known; what the table
holds already for this GPU, vLLM, commit and flags is left out. What follows `--` goes
to every engine.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path

from benchmarks.serving.online_shapes import DEFAULT_SIDES, SHAPES
from benchmarks.serving.online_shapes import SIDES as ONLINE_SIDES
from benchmarks.serving.prefix_workloads import PREFIX_WORKLOADS, SIDES, prefix_runs
from benchmarks.serving.rate_search import SHARE
from benchmarks.serving.signals import unwind_once
from benchmarks.serving.workloads import CHUNKS, VARIANTS, WORKLOADS, runs


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    engines = argparse.ArgumentParser(add_help=False)
    engines.add_argument("--out", type=Path, required=True, help="folder of the tables")
    engines.add_argument(
        "--time-limit",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="begin nothing new after this",
    )
    engines.add_argument("--commit", help="name of the code, where git cannot tell it")
    engines.add_argument("--tokenizer", help="folder; default: SmolLM2's")

    command = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = command.add_subparsers(dest="task", required=True)
    for name, workload in WORKLOADS.items():
        task = tasks.add_parser(name, help=workload.about, parents=[engines])
        task.add_argument("--variants", nargs="+", choices=VARIANTS)
        task.add_argument("--gpu-memory-utilization", type=float, nargs="+")
        task.add_argument(
            "--input-len", type=int, nargs="+", help="leave out the other batches"
        )
        task.add_argument("--rounds", type=int, default=1, help=_ROUNDS)
        task.add_argument("--model", help="another folder of benchmarks/models")
        task.add_argument(
            "--baseline", default="FLASH_ATTN", help="backend of stock vLLM"
        )
    prefill = tasks.add_parser(
        "prefill", help="time to first token, by chunk", parents=[engines]
    )
    prefill.add_argument("--chunks", type=int, nargs="+", default=CHUNKS)
    prefill.add_argument("--rounds", type=int, default=1, help=_ROUNDS)
    prefixes = tasks.add_parser(
        "prefixes", help="prefixes that requests share, read once", parents=[engines]
    )
    every = [name for name in PREFIX_WORKLOADS if name != "prefix-smoke"]
    prefixes.add_argument(
        "--workloads", nargs="+", choices=PREFIX_WORKLOADS, default=every
    )
    prefixes.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    prefixes.add_argument("--budgets", type=int, nargs="+")
    prefixes.add_argument("--rounds", type=int, default=1, help=_ROUNDS)
    prefixes.add_argument("--gpu-memory-utilization", type=float, default=0.5)
    prefixes.add_argument("--baseline", default="FLASH_ATTN")
    _add_online(tasks.add_parser("online", help=_ONLINE, parents=[engines]))
    memory = tasks.add_parser(
        "memory", help="KV tokens held per sequence over time", parents=[engines]
    )
    memory.add_argument("--model", default="smollm2-135m")
    memory.add_argument("--baseline", default="FLASH_ATTN")
    profile = tasks.add_parser(
        "profile", help="a decode step's kernels, from traces", parents=[engines]
    )
    profile.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["stock", "roco"]
    )
    options = tasks.add_parser(
        "request-options",
        help="a decode step whose requests all have options of their own",
        parents=[engines],
    )
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--requests", type=int, default=256)
    options.add_argument(
        "--rounds", type=int, default=5, help="how often each side has its turn"
    )
    tasks.add_parser(
        "scheduler", help="the scheduler's Python; needs no GPU", parents=[engines]
    )
    return command


_ROUNDS = "how often each engine has its turn"
_ONLINE = "the largest rate of requests that keep their latency, over HTTP"


def _add_online(online: argparse.ArgumentParser) -> None:
    every = [name for name in SHAPES if not name.endswith(("-smoke", "-short"))]
    online.add_argument(
        "--shapes",
        nargs="+",
        default=every,
        metavar="SHAPE[:MEMORY]",
        help=f"of {', '.join(SHAPES)}; with all of its memories, or `scarce` alone",
    )
    online.add_argument(
        "--sides", nargs="+", choices=ONLINE_SIDES, default=DEFAULT_SIDES
    )
    online.add_argument("--rounds", type=int, default=1)
    online.add_argument("--baseline", default="FLASH_ATTN")
    online.add_argument(
        "--share",
        type=float,
        default=SHARE,
        help="share of the requests that must keep their limits",
    )
    online.add_argument(
        "--precision",
        type=float,
        default=1.1,
        help="ratio of a rate that is not kept to one that is, which ends the search",
    )
    online.add_argument("--rates", type=float, nargs="+", help="ask at these instead")
    online.add_argument(
        "--together",
        action="store_true",
        help="start all servers at once and let them live; the GPU must hold them all",
    )
    online.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        help="what must be free when a server starts",
    )
    online.add_argument(
        "--kv-cache-gib",
        type=float,
        nargs="+",
        help="instead of the shapes', one figure or one for each side",
    )
    online.add_argument(
        "--num-requests",
        type=int,
        nargs="+",
        help="at each rate, one figure or one for each shape",
    )
    for name in ("least_seconds", "input_len", "output_len", "budget"):
        option = f"--{name.replace('_', '-')}"
        online.add_argument(option, type=int, help="instead of the shapes'")


def main(command: list[str]) -> int:
    """Run the command line; return its exit status."""
    end = [*command, "--"].index("--")
    arguments, engine_arguments = parser().parse_args(command[:end]), command[end + 1 :]

    # they import vLLM, which takes its time
    from benchmarks.machine import environment_elsewhere
    from benchmarks.serving import (
        online,
        prefill,
        prefixes,
        profiling,
        request_options,
        residency,
        scheduling,
        serve_workloads,
    )
    from benchmarks.serving.jobs import Session
    from tools.packaged_models import SMOLLM2, find_model

    facts = environment_elsewhere()
    commit = arguments.commit or facts["commit"]
    facts |= {"commit": commit, "flags": shlex.join(engine_arguments)}
    session = Session(arguments.out, facts, arguments.time_limit)
    if arguments.task == "scheduler":
        return session.run(scheduling.TABLE, scheduling.jobs())
    tokenizer = arguments.tokenizer or str(find_model(SMOLLM2))
    common = [f"--tokenizer={tokenizer}", *engine_arguments]
    match arguments.task:
        case "profile":
            profiling.run(session, arguments.variants, common)
            return 0
        case "prefill":
            jobs = prefill.jobs(arguments.chunks, arguments.rounds, common)
            return session.run(prefill.TABLE, jobs)
        case "prefixes":
            runs_of_prefixes = prefix_runs(
                arguments.workloads,
                arguments.sides,
                budgets=arguments.budgets,
                rounds=arguments.rounds,
                gpu_memory_utilization=arguments.gpu_memory_utilization,
                baseline=arguments.baseline,
            )
            jobs = prefixes.jobs(runs_of_prefixes, tokenizer, engine_arguments)
            return session.run(prefixes.TABLE, jobs)
        case "online":
            return online.run(session, arguments, tokenizer, engine_arguments)
        case "request-options":
            jobs = request_options.jobs(
                arguments.model, arguments.requests, arguments.rounds, common
            )
            return session.run(request_options.TABLE, jobs)
        case "memory":
            sides = (arguments.model, arguments.baseline)
            jobs = residency.jobs(*sides, common, session.out)
            return session.run(residency.TABLE, jobs)
        case workload:
            selected = runs(
                workload,
                variants=arguments.variants,
                gpu_memory_utilization=arguments.gpu_memory_utilization,
                input_lens=arguments.input_len,
                model=arguments.model,
                baseline=arguments.baseline,
                rounds=arguments.rounds,
            )
            jobs = serve_workloads.jobs(selected, common)
            return session.run(serve_workloads.TABLE, jobs)


if __name__ == "__main__":
    unwind_once()
    sys.exit(main(sys.argv[1:]))
