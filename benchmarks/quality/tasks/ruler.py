# SPDX-License-Identifier: Apache-2.0
"""The tasks of RULER that need no text but their own, as lm-eval generates them.

RULER (arXiv 2404.06654) is NVIDIA's, lm-eval EleutherAI's. `ruler.jsonl.xz` holds the
problems, in lm-eval's prompts; `make_ruler.py` wrote it.
"""

from __future__ import annotations

import json
import lzma
import random
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.quality.tasks.problem import Problem

RULER_TASKS = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "vt",
    "cwe",
    "fwe",
)
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
            f"{context}, not {n}. Ask for fewer, or write more with make_ruler.py."
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
def _stored() -> dict[tuple[str, int], list[dict[str, Any]]]:
    kinds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with lzma.open(PROBLEMS, "rt", encoding="utf-8") as file:
        for line in file:
            problem = json.loads(line)
            kinds.setdefault((problem["task"], problem["context"]), []).append(problem)
    return kinds
