# SPDX-License-Identifier: Apache-2.0
"""Adapters for small models, so that they solve what eviction is to be judged by.

    python -m benchmarks.quality.training train --out ADAPTER --time-limit 300
    python -m benchmarks.quality.training evaluate --model FOLDER
    python -m benchmarks.quality.training merge --out FOLDER --adapter ADAPTER

The first one trains on generated problems of all tasks, on a GPU in minutes. The last
one writes a model's folder, which everything here takes by `--model`. The adapter in
`adapters` is the default there; `--model SmolLM2-135M-Instruct-trained` merges it by
itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import machine
from benchmarks.quality.training import evaluation, low_rank
from benchmarks.quality.training.samples import LENGTHS, SHARES
from benchmarks.quality.training.supply import supply
from benchmarks.quality.training.trained import (
    ADAPTER,
    TRAINED,
    find_any,
    write_merged,
)
from benchmarks.quality.training.training import (
    Plan,
    evaluated,
    train,
    write_report,
)
from tools.packaged_models import SMOLLM2


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("train", _train), ("evaluate", _evaluate), ("merge", _merge)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        add = command.add_argument
        add("--model", default=SMOLLM2, help=f"a packaged model, {TRAINED} or a folder")
        if name in ("train", "merge"):
            add("--out", type=Path, required=True, metavar="DIR")
        if name == "merge":
            add("--adapter", type=Path, default=ADAPTER, metavar="DIR")
        if name in ("train", "evaluate"):
            add("--problems", type=int, default=32, help="of each kind, at the end")
            add("--contexts", type=int, nargs="+", default=evaluation.CONTEXTS)
        if name == "train":
            add("--time-limit", type=float, default=300, metavar="SECONDS")
            add("--steps", type=int, default=0, help="most; default: the time's")
            add("--rank", type=int, default=12)
            add("--rate", type=float, default=2e-3, help="largest learning rate")
            add("--batch-tokens", type=int, default=32 * 1024)
            add("--start", type=Path, metavar="DIR", help="adapter to go on from")
            add(
                *("--shares", "-s"),
                type=_share,
                nargs="+",
                default=list(SHARES.items()),
                metavar="TASK=N",
                help="how often each task is drawn; others not at all",
            )
            add("--lengths", type=int, nargs="+", default=LENGTHS)
            add("--evaluate-every", type=int, default=300, metavar="STEPS")
            add("--target", type=float, default=0.99, help="of every task: then end")
            add("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
            add("--seed", type=int, default=0)
            add("--commit", help="to be named in the report; default: git's")
    arguments = parser.parse_args()
    # there is a process for every core
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    arguments.run(arguments)


def _share(text: str) -> tuple[str, float]:
    task, _, share = text.partition("=")
    if task not in SHARES:
        raise argparse.ArgumentTypeError(f"{task!r} is not one of {', '.join(SHARES)}")
    return task, float(share)


def _load(folder: str) -> Any:
    on_gpu = torch.cuda.is_available()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        # kernels for bfloat16 are slow on CPUs
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        attn_implementation="sdpa",
    )
    return model.to("cuda" if on_gpu else "cpu").eval()


def _train(arguments: argparse.Namespace) -> None:
    begin = time.monotonic()
    folder = find_any(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(arguments.seed)
    plan = Plan(
        rank=arguments.rank,
        rate=arguments.rate,
        time_limit=arguments.time_limit,
        steps=arguments.steps,
        evaluate_every=arguments.evaluate_every,
        target=arguments.target,
    )
    contexts = tuple(arguments.contexts)
    few = max(1, arguments.problems // 4)
    paper = evaluation.write_paper(tokenizer, few, contexts, arguments.processes)
    with supply(
        tokenizer,
        arguments.batch_tokens,
        arguments.seed,
        arguments.processes,
        tuple(arguments.lengths),
        dict(arguments.shares),
    ) as batches:
        model = _load(folder)
        _say(f"loaded after {time.monotonic() - begin:.0f} s")

        def judge() -> dict[str, float]:
            # whatever ends the process later
            low_rank.save(model, arguments.out, arguments.model)
            return evaluation.judge(model, paper)

        course = train(model, batches, plan, judge, _say, arguments.start)
    low_rank.save(model, arguments.out, arguments.model)
    report = {
        "gpu": machine.device_name(),
        **{name: machine.version(name) for name in ("torch", "transformers")},
        "python": platform.python_version(),
        "commit": arguments.commit or machine.commit(),
        "command": shlex.join(sys.orig_argv[1:]),
        "seed": arguments.seed,
        "batch_tokens": arguments.batch_tokens,
        "lengths": list(arguments.lengths),
        "shares": dict(arguments.shares),
        "start": str(arguments.start or ""),
        "problems": arguments.problems,
    }
    # whatever becomes of the last evaluation
    write_report(arguments.out, plan, course, report)
    _say(f"written after {time.monotonic() - begin:.0f} s")

    def answer() -> dict[str, float]:
        return evaluation.judge(model, paper) | _answer_ruler(
            model, tokenizer, arguments
        )

    scores = evaluated(model, answer)
    write_report(arguments.out, plan, course, {**report, "scores": scores})
    _say(json.dumps(scores, indent=1))


def _evaluate(arguments: argparse.Namespace) -> None:
    folder = find_any(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    contexts = tuple(arguments.contexts)
    paper = evaluation.write_paper(tokenizer, arguments.problems, contexts, 2)
    model = _load(folder)
    scores = evaluation.judge(model, paper)
    scores |= _answer_ruler(model, tokenizer, arguments)
    _say(json.dumps(scores, indent=1))


def _answer_ruler(
    model: Any, tokenizer: Any, arguments: argparse.Namespace
) -> dict[str, float]:
    # there are problems of these contexts only
    contexts = tuple(
        context for context in arguments.contexts if context in evaluation.CONTEXTS
    )
    return evaluation.answer_ruler(model, tokenizer, arguments.problems, contexts)


def _merge(arguments: argparse.Namespace) -> None:
    write_merged(find_any(arguments.model), arguments.adapter, arguments.out)
    _say(str(arguments.out))


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
