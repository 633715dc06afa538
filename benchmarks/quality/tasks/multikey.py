# SPDX-License-Identifier: Apache-2.0
"""Many keys, a line and a number each: RULER's `niah_multikey_2` (arXiv 2404.06654)."""

from __future__ import annotations

from benchmarks.quality.tasks.exchange import Exchange, Writer, in_turn
from benchmarks.quality.tasks.needle import NEEDLE, QUESTION, TASK

ANSWER_TOKENS = 12


def write_multikey(writer: Writer, questions: int) -> list[Exchange]:
    """Return a text of such lines, and questions about some of the keys."""
    facts: dict[str, str] = {}

    def lines() -> str:
        key, number = next(keys), writer.number()
        facts[key] = number
        return f"{NEEDLE.format(name=key, number=number)}\n"

    keys = writer.keys()
    longest = max(writer.material.words, key=len)
    spare = QUESTION.format(name=f"{longest}-{longest}")
    text = writer.fill(iter(lines, None), f"{TASK}\n", spare)
    # of what was drawn, only so much found room
    told = list(facts)[: len(text)]
    asked = writer.draw.sample(told, min(questions, len(told)))
    return in_turn(
        f"{TASK}\n{''.join(text)}".rstrip("\n"),
        [ask_for(key, facts[key]) for key in asked],
    )


def ask_for(name: str, number: str) -> Exchange:
    """Return the question after one number."""
    return Exchange(QUESTION.format(name=name), f" {number}.", (number,), ANSWER_TOKENS)
