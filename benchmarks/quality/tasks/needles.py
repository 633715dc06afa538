# SPDX-License-Identifier: Apache-2.0
"""Several needles in one text: `needle` for more than one question."""

from __future__ import annotations

from benchmarks.quality.tasks.exchange import Exchange, Writer, in_turn
from benchmarks.quality.tasks.multikey import ask_for
from benchmarks.quality.tasks.needle import NEEDLE, QUESTION, TASK

FACTS = 4


def write_needles(writer: Writer, questions: int) -> list[Exchange]:
    """Return prose with four needles, and questions about some of them."""
    names = writer.draw.sample(writer.material.names, FACTS)
    facts = {name: writer.number() for name in names}
    needles = [NEEDLE.format(name=name, number=facts[name]) for name in names]
    text = hide(writer, needles, f"{TASK}\n", QUESTION.format(name=names[0]))
    asked = writer.draw.sample(names, min(questions, FACTS))
    return in_turn(f"{TASK}\n{text}", [ask_for(name, facts[name]) for name in asked])


def hide(writer: Writer, needles: list[str], *others: str) -> str:
    """Return prose with a sentence of each needle at a place of its own, in order.

    Args:
        writer: Draws text and places.
        needles: Sentences.
        *others: What has to stand beside the text.
    """
    sentences = writer.prose(*others, *(f" {needle}" for needle in needles))
    places = sorted(writer.draw.choices(range(len(sentences) + 1), k=len(needles)))
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        sentences.insert(place, needle)
    return " ".join(sentences)
