# SPDX-License-Identifier: Apache-2.0
"""The tasks of RULER that need no text but their own, as lm-eval generates them.

RULER (arXiv 2404.06654) is NVIDIA's, lm-eval EleutherAI's. `ruler.jsonl.xz` holds the
problems, in lm-eval's prompts, so that a machine without lm-eval and without a network
can be measured with the same ones. To write them anew::

    pip install "lm-eval[ruler]==0.4.13"
    python -m benchmarks.quality.tasks.ruler
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy

from benchmarks.quality.tasks.problem import Problem
from tools.packaged_models import SMOLLM2, find_model

RULER_TASKS = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "vt",
    "cwe",
    "fwe",
)
HARD_TASKS = ("niah_multikey_2", "vt", "cwe")
"""Those that an adapter is trained for, at both contexts."""
KINDS = (
    *((task, 2048) for task in RULER_TASKS),
    *((task, 4096) for task in HARD_TASKS),
)
"""Tasks and contexts there are problems of."""
PROBLEMS = Path(__file__).with_name("ruler.jsonl.xz")


def build_ruler(
    task: str, tokenizer: Any, context: int, n: int, seed: int
) -> list[Problem]:
    """Return `n` problems of a RULER task; `seed` picks them out of the file's.

    Raises:
        ValueError: The file has fewer problems of this kind.
    """
    stored = _stored().get((task, context), [])
    if n > len(stored):
        raise ValueError(
            f"{PROBLEMS.name} has {len(stored)} problems of task {task!r} at context "
            f"{context}, not {n}. Ask for fewer, or write more: see ruler.py."
        )
    chosen = random.Random(seed).sample(stored, n)
    return [
        Problem(
            token_ids=list(tokenizer(problem["prompt"])["input_ids"]),
            max_tokens=problem["max_tokens"],
            answers=tuple(problem["answers"]),
        )
        for problem in chosen
    ]


@cache
def words() -> frozenset[str]:
    """Return every word of small letters in the problems."""
    prompts = (problem["prompt"] for kind in _stored().values() for problem in kind)
    return frozenset(
        word for prompt in prompts for word in re.findall(r"[a-z]+", prompt)
    )


@cache
def _stored() -> dict[tuple[str, int], list[dict[str, Any]]]:
    kinds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with lzma.open(PROBLEMS, "rt", encoding="utf-8") as file:
        for line in file:
            problem = json.loads(line)
            kinds.setdefault((problem["task"], problem["context"]), []).append(problem)
    return kinds


def main() -> None:
    """Write the problems with lm-eval's own generators."""
    from lm_eval.tasks import TaskManager, get_task_dict

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=50_000)
    arguments = parser.parse_args()

    tokenizer = str(find_model(SMOLLM2))
    with lzma.open(PROBLEMS, "wt", encoding="utf-8", preset=9) as file:
        for name, context in KINDS:
            # the generators draw from the global state
            random.seed(arguments.seed)
            numpy.random.seed(arguments.seed)
            metadata = {"tokenizer": tokenizer, "max_seq_lengths": [context]}
            manager = TaskManager(metadata=metadata)
            theirs = f"ruler_{name}" if len(name) < 4 else name
            (task,) = get_task_dict([theirs], manager).values()
            for document in list(task.test_docs())[: arguments.problems]:
                problem = {
                    "task": name,
                    "context": context,
                    "prompt": task.fewshot_context(
                        document,
                        num_fewshot=0,
                        gen_prefix=task.doc_to_prefix(document),
                    ),
                    "answers": document["outputs"],
                    "max_tokens": task.config.generation_kwargs["max_gen_toks"],
                }
                file.write(json.dumps(problem) + "\n")


if __name__ == "__main__":
    main()
