# SPDX-License-Identifier: Apache-2.0
"""Texts to train on: problems of all tasks with their answers, of training's material.

No word, name or passage of a novel is the reports', see `tasks.material`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from benchmarks.quality.tasks.conversation import GENERATORS, RETRIEVAL
from benchmarks.quality.tasks.derivation import prompt_tokens, write_derivation
from benchmarks.quality.tasks.exchange import (
    PAUSE_TOKENS,
    Exchange,
    Writer,
    fitted,
    with_a_pause,
)
from benchmarks.quality.tasks.material import training_material

LENGTHS = (512, 1024, 1536, 2304, 3328, 4608)
"""Tokens of a text with all that is said about it."""

_WRITERS = {**GENERATORS, "derivation": write_derivation}
SHARES = {
    "needle": 2,
    "multikey": 4,
    "multivalue": 3,
    "variables": 4,
    "common_words": 4,
    "derivation": 4,
}
"""How often each is drawn, where nothing else is asked for."""
TASKS = tuple(SHARES)
_MOST_QUESTIONS = {"needle": 4, "multikey": 20, "multivalue": 4, "variables": 3}
_EXCHANGE_TOKENS = {
    "needle": 42,
    "multikey": 50,
    "multivalue": 90,
    "variables": 95,
    "common_words": 70,
}
"""About what a question and its answer take."""
_LEAST_LENGTH = {"multivalue": 1024, "variables": 1024}
_PAUSES = 0.25
"""Share of the retrieval tasks in which a story comes before the questions."""
_LEAST_STORY = 128
_TEXT_WEIGHT = 0.1
"""Of everything that is no answer, together."""
_EVERY = 16
"""Of the tokens that are no answer, one of so many is trained on."""


@dataclass(frozen=True)
class Sample:
    """A text and how much each token of it counts.

    Attributes:
        token_ids: `[n]` int32.
        weights: `[n]` float32, what predicting this token counts.
    """

    token_ids: numpy.ndarray
    weights: numpy.ndarray


def draw_sample(
    seed: str, tokenizer: Any, length: int, shares: Mapping[str, float] = SHARES
) -> Sample:
    """Return a problem of any task, with its answers.

    Args:
        seed: Of everything that is random.
        tokenizer: A fast Hugging Face tokenizer.
        length: About the most tokens.
        shares: How often each task is drawn.
    """
    draw = random.Random(seed)
    tasks = [task for task in shares if length >= _LEAST_LENGTH.get(task, 0)]
    (task,) = draw.choices(tasks, [shares[task] for task in tasks])
    return encode(write(task, draw, seed, tokenizer, length), tokenizer, draw)


def write(
    task: str, draw: random.Random, seed: str, tokenizer: Any, length: int
) -> list[Exchange]:
    """Return a problem of a task and its answers as text, of about `length` tokens."""
    # at most half of what can be spared is for questions
    spare = (length - _LEAST_LENGTH.get(task, LENGTHS[0] // 2)) // 2
    most = min(_MOST_QUESTIONS.get(task, 1), spare // _EXCHANGE_TOKENS.get(task, 1))
    questions = draw.randint(1, max(1, most))
    context = length - questions * _EXCHANGE_TOKENS.get(task, 0)
    if task == "derivation":
        context = prompt_tokens(length)
    story = 0
    if task in RETRIEVAL and length >= 1024 and draw.random() < _PAUSES:
        story = draw.randint(_LEAST_STORY, min(PAUSE_TOKENS, length // 3))
        context -= story

    def write_one(writer: Writer) -> list[Exchange]:
        exchanges = _WRITERS[task](writer, questions)
        return with_a_pause(exchanges, writer, story) if story else exchanges

    return fitted(write_one, seed, training_material(), tokenizer, context)


def encode(
    exchanges: Sequence[Exchange], tokenizer: Any, draw: random.Random
) -> Sample:
    """Return the tokens of a conversation, an end token behind each answer.

    Answers count by the cube root of their length in all, so that a long one counts
    more than a short one, and each of its tokens less.
    """
    ids: list[int] = []
    answers: list[int] = []
    others: list[int] = []
    for exchange in exchanges:
        asked = tokenizer(exchange.ask, add_special_tokens=not ids)["input_ids"]
        replied = tokenizer(exchange.reply, add_special_tokens=False)["input_ids"]
        replied = [*replied, tokenizer.eos_token_id]
        start = len(ids)
        ids += asked
        others += range(start, len(ids))
        start = len(ids)
        ids += replied
        (answers if exchange.answers else others).extend(range(start, len(ids)))
    weights = numpy.zeros(len(ids), numpy.float32)
    weights[answers] = len(answers) ** (1 / 3 - 1)
    chosen = draw.sample(others, -(-len(others) // _EVERY))
    weights[chosen] = _TEXT_WEIGHT / len(chosen)
    # nothing predicts the first one
    weights[0] = 0
    return Sample(numpy.asarray(ids, numpy.int32), weights)
