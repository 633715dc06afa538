# SPDX-License-Identifier: Apache-2.0
"""What quality is measured by: problems with an answer, and prose without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.quality.tasks.conversation import CONVERSATIONS, build_conversations
from benchmarks.quality.tasks.derivation import DERIVATION, build_derivations
from benchmarks.quality.tasks.needle import build_needles
from benchmarks.quality.tasks.passkey import build_passkeys
from benchmarks.quality.tasks.problem import Problem, Question
from benchmarks.quality.tasks.prose import FIRST_REPORT_SEED, prose
from benchmarks.quality.tasks.ruler import HARD_TASKS, RULER_TASKS, build_ruler

__all__ = [
    "CONVERSATIONS",
    "FIRST_REPORT_SEED",
    "HARD_TASKS",
    "RULER_TASKS",
    "TASKS",
    "Problem",
    "Question",
    "build",
    "prose",
    "tokens_behind",
]

TASKS: dict[str, Callable[[Any, int, int, int], list[Problem]]] = {
    "passkey": build_passkeys,
    "needle": build_needles,
    **{task: partial(build_ruler, task) for task in RULER_TASKS},
    **{name: partial(build_conversations, name) for name in CONVERSATIONS},
    DERIVATION: build_derivations,
}
"""What builds the problems of each task, see `build`."""


def build(task: str, tokenizer: Any, context: int, n: int, seed: int) -> list[Problem]:
    """Return `n` problems, the same ones for the same arguments.

    Args:
        task: One of `TASKS`.
        tokenizer: A fast Hugging Face tokenizer.
        context: Most tokens of a prompt.
        n: Number of problems.
        seed: From `FIRST_REPORT_SEED` on for reports, below it for tuning.

    Raises:
        ValueError: There is no such task, or it cannot be built this way.
    """
    if task not in TASKS:
        raise ValueError(f"task = {task!r} is not one of {', '.join(TASKS)}.")
    return TASKS[task](tokenizer, context, n, seed)


def tokens_behind(task: str) -> int:
    """Return the most tokens between a problem's prompt and its last answer."""
    form = CONVERSATIONS.get(task)
    return form.tokens_behind if form else 0
