# SPDX-License-Identifier: Apache-2.0
"""Four numbers to a key, asked for at once: RULER's `niah_multivalue`, four times."""

from __future__ import annotations

from benchmarks.quality.tasks.exchange import Exchange, Writer, in_turn
from benchmarks.quality.tasks.needle import NEEDLE
from benchmarks.quality.tasks.needles import hide

TASK = (
    "Some special magic numbers are hidden within the following text. Make sure to "
    "memorize it. I will quiz you about the numbers afterwards."
)
QUESTION = (
    "What are all the special magic numbers for {name} mentioned in the provided text? "
    "The special magic numbers for {name} mentioned in the provided text are"
)
ANSWER_TOKENS = 48
KEYS = 4
VALUES = 4


def write_multivalue(writer: Writer, questions: int) -> list[Exchange]:
    """Return prose with four numbers for each of four keys, and questions."""
    keys = writer.keys()
    facts = [(next(keys), writer.number()) for _ in range(KEYS)]
    names = [name for name, _ in facts]
    facts += [(name, writer.number()) for name in names * (VALUES - 1)]
    writer.draw.shuffle(facts)
    needles = [NEEDLE.format(name=name, number=number) for name, number in facts]
    longest = QUESTION.format(name=max(names, key=len))
    text = hide(writer, needles, f"{TASK}\n", longest)
    asked = writer.draw.sample(names, min(questions, KEYS))
    return in_turn(f"{TASK}\n{text}", [_ask(name, facts) for name in asked])


def _ask(name: str, facts: list[tuple[str, str]]) -> Exchange:
    numbers = tuple(number for other, number in facts if other == name)
    listed = f"{', '.join(numbers[:-1])}, and {numbers[-1]}"
    return Exchange(QUESTION.format(name=name), f" {listed}.", numbers, ANSWER_TOKENS)
