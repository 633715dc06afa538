# SPDX-License-Identifier: Apache-2.0
"""Needle in prose: one sentence with a number between the sentences of a novel.

The wording is that of RULER's `niah_single_2` (arXiv 2404.06654).
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import Any

from benchmarks.quality.tasks.problem import Problem
from benchmarks.quality.tasks.prose import novel

TASK = (
    "A special magic number is hidden within the following text. Make sure to memorize "
    "it. I will quiz you about the number afterwards."
)
NEEDLE = "One of the special magic numbers for {name} is: {number}."
QUESTION = (
    "What is the special magic number for {name} mentioned in the provided text? "
    "The special magic number for {name} mentioned in the provided text is"
)
NAMES = (
    *("Amsterdam", "Buenos Aires", "Copenhagen", "Dublin", "Edinburgh", "Helsinki"),
    *("Istanbul", "Jakarta", "Kyoto", "Lisbon", "Montreal", "Nairobi", "Oslo"),
)

_ANSWER_TOKENS = 12
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def build_needles(tokenizer: Any, context: int, n: int, seed: int) -> list[Problem]:
    """Return `n` prompts with numbers and text of their own, depths from 0 to 1.

    Args:
        tokenizer: A Hugging Face tokenizer.
        context: Most tokens of a prompt; it is shorter by less than a sentence.
        n: Number of prompts.
        seed: Chooses numbers and text; also the novel, see `prose`.

    Raises:
        ValueError: `context` leaves no room for prose, or is longer than the novel.
    """
    sentences = _SENTENCE_END.split(novel(seed).strip())
    encoded = tokenizer(
        [f" {sentence}" for sentence in sentences], add_special_tokens=False
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    return [
        _build(tokenizer, sentences, lengths, context, (index + 0.5) / n, seed + index)
        for index in range(n)
    ]


def _build(
    tokenizer: Any,
    sentences: list[str],
    lengths: list[int],
    context: int,
    depth: float,
    seed: int,
) -> Problem:
    draw = random.Random(seed)
    number = str(draw.randint(1_000_000, 9_999_999))
    needle = (draw.choice(NAMES), number)
    room = context - len(tokenizer(_prompt([], needle, []))["input_ids"])
    ends = list(accumulate(lengths))
    if not max(lengths) < room < ends[-1]:
        raise ValueError(
            f"context = {context} leaves {room} tokens for prose, which must be more "
            f"than its longest sentence ({max(lengths)}) and less than the novel "
            f"({ends[-1]})."
        )
    first = draw.randrange(bisect_left(ends, ends[-1] - room))
    start = ends[first - 1] if first else 0
    middle = bisect_left(ends, start + depth * room)
    before = sentences[first:middle]
    after = sentences[middle : bisect_right(ends, start + room)]
    token_ids = list(tokenizer(_prompt(before, needle, after))["input_ids"])
    # some tokenizers take other tokens across the sentences' ends
    while len(token_ids) > context:
        (after or before).pop()
        token_ids = list(tokenizer(_prompt(before, needle, after))["input_ids"])
    return Problem(token_ids, _ANSWER_TOKENS, (number,))


def _prompt(before: list[str], needle: tuple[str, str], after: list[str]) -> str:
    name, number = needle
    text = " ".join([*before, NEEDLE.format(name=name, number=number), *after])
    return f"{TASK}\n{text}\n{QUESTION.format(name=name)}"
