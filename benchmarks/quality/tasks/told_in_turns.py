# SPDX-License-Identifier: Apache-2.0
"""A needle in prose that is told in turns, and asked for in the last one.

The texts are those of `needle`, cut between sentences, in ChatML.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.quality.tasks.needle import build_needles
from benchmarks.quality.tasks.problem import Problem

TURN_END = "<|im_end|>"
WORDS = 220
"""Of a turn, at least: some 300 tokens with the answer. No turn has twice as many."""

_BEGIN = "<|im_start|>"
ANSWER_START = f"{_BEGIN}assistant\n"
"""What the template puts before an answer."""
_TOLD_BY = {
    "user": (
        f"{_BEGIN}user\nRemember this: {{told}}{TURN_END}\n"
        f"{ANSWER_START}I will remember it.{TURN_END}\n"
    ),
    "assistant": (
        f"{_BEGIN}user\nGo on with the text.{TURN_END}\n"
        f"{ANSWER_START}{{told}}{TURN_END}\n"
    ),
}
TELLERS = tuple(_TOLD_BY)
"""Who tells the prose: in questions, or in answers."""
_ASKED = f"{_BEGIN}user\n{{question}}?{TURN_END}\n{ANSWER_START}{{begun}}"
_ANSWER_TOKENS = 16


def build_told_in_turns(
    tokenizer: Any, context: int, n: int, seed: int, teller: str = "user"
) -> list[Problem]:
    """Return `n` conversations, each about a number in its text, depths from 0 to 1.

    Args:
        tokenizer: A Hugging Face tokenizer of a model whose chats are ChatML.
        context: Most tokens of the text that is told. What stands around it in the
            turns comes on top: less than 400 tokens for 4,096.
        n: Number of conversations.
        seed: As that of `build_needles`.
        teller: One of `TELLERS`.

    Raises:
        ValueError: The end of a turn is no token of its own, or what `build_needles`
            raises.
    """
    # what a tokenizer calls its end token is not always the model's
    end = tokenizer(TURN_END, add_special_tokens=False)["input_ids"]
    if len(end) != 1:
        raise ValueError(
            f"the tokenizer makes {len(end)} tokens of {TURN_END!r}, with which a turn "
            "of the conversations ends. Use a model of ChatML."
        )
    problems = build_needles(tokenizer, context, n, seed)
    return [
        replace(
            problem,
            token_ids=list(
                tokenizer(_in_turns(tokenizer, problem, teller))["input_ids"]
            ),
            max_tokens=_ANSWER_TOKENS,
        )
        for problem in problems
    ]


def _in_turns(tokenizer: Any, problem: Problem, teller: str) -> str:
    # the task stands in the first line, the question in the last one
    _, *body, asked = tokenizer.decode(problem.token_ids).split("\n")
    question, begun = asked.split("?", 1)
    parts = _parts(" ".join(body))
    told = "".join(_TOLD_BY[teller].format(told=part) for part in parts)
    return told + _ASKED.format(question=question, begun=begun.strip())


def _parts(text: str) -> Iterator[str]:
    """Yield what is told in each turn, whole sentences but for very long ones."""
    part: list[str] = []
    for word in text.split(" "):
        part.append(word)
        is_long = len(part) >= WORDS and word.endswith((".", "!", "?"))
        if is_long or len(part) >= 2 * WORDS:
            yield " ".join(part)
            part = []
    if part:
        yield " ".join(part)
