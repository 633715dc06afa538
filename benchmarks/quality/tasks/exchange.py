# SPDX-License-Identifier: Apache-2.0
"""A problem as text, before any tokenizer: what is asked and what is to be replied."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.quality.tasks.material import Material
from benchmarks.quality.tasks.problem import Problem, Question

PAUSE = "First write a long story.\nStory:"
"""What the model is asked to write between a text and the question about it."""
PAUSE_TOKENS = 1024
"""Written then."""

_SLACK = 8
_LINES = 64


@dataclass(frozen=True)
class Exchange:
    """One question and its answer.

    Attributes:
        ask: What is read, with the text in front of it if it is the first one.
        reply: The whole answer, as an adapter is trained to give it.
        answers: What is looked for in an answer; none if it is only to be written.
        max_tokens: Most tokens of an answer.
    """

    ask: str
    reply: str
    answers: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True)
class Writer:
    """What a generator writes with.

    Attributes:
        draw: The source of all that is random.
        material: What text is made of.
        tokenizer: A fast Hugging Face tokenizer.
        room: Most tokens of the first question and the text in front of it.
    """

    draw: random.Random
    material: Material
    tokenizer: Any
    room: int

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each text."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def fill(self, lines: Iterator[str], *others: str) -> list[str]:
        """Return as many lines as there is room for.

        Args:
            lines: At least as many.
            *others: What has to stand beside them.

        Raises:
            ValueError: There is room for none.
        """
        room = self.room - _SLACK - sum(self.count(others))
        found: list[str] = []
        while True:
            batch = [next(lines) for _ in range(_LINES)]
            for line, length in zip(batch, self.count(batch), strict=True):
                room -= length
                if room < 0:
                    if not found:
                        raise ValueError(
                            f"context = {self.room} leaves no room for any text. "
                            "Use a longer one."
                        )
                    return found
                found.append(line)

    def keys(self) -> Iterator[str]:
        """Yield pairs of words, none twice."""
        seen: set[str] = set()
        while True:
            key = "-".join(self.draw.sample(self.material.words, 2))
            if key not in seen:
                seen.add(key)
                yield key

    def number(self) -> str:
        """Return a number of seven digits."""
        return str(self.draw.randint(1_000_000, 9_999_999))

    def prose(self, *others: str) -> list[str]:
        """Return successive sentences that fill the room beside others."""
        sentences = self.material.sentences
        first = self.draw.randrange(len(sentences))

        def from_first() -> Iterator[str]:
            index = first
            while True:
                yield f" {sentences[index % len(sentences)]}"
                index += 1

        return [line[1:] for line in self.fill(from_first(), *others)]


Generator = Callable[[Writer, int], list[Exchange]]
"""Writes a text and so many questions about it."""


def with_a_pause(
    exchanges: list[Exchange], writer: Writer, tokens: int = PAUSE_TOKENS
) -> list[Exchange]:
    """Return a conversation in which a story is written before the first question.

    Args:
        exchanges: Of a generator that asks at the end of a text, in a line of its own.
        writer: Of the same problem.
        tokens: Most tokens of the story.
    """
    first = exchanges[0]
    text, line_break, ask = first.ask.rpartition("\n")
    story = Writer(writer.draw, writer.material, writer.tokenizer, tokens).prose()
    return [
        Exchange(f"{text}\n{PAUSE}", f" {' '.join(story)}", (), tokens),
        replace(first, ask=line_break + ask),
        *exchanges[1:],
    ]


def in_turn(text: str, questions: Sequence[Exchange]) -> list[Exchange]:
    """Return questions about one text, each in a line of its own."""
    first, *others = questions
    return [
        replace(first, ask=f"{text}\n{first.ask}"),
        *(replace(each, ask=f"\n{each.ask}") for each in others),
    ]


def to_problem(tokenizer: Any, exchanges: Sequence[Exchange]) -> Problem:
    """Return what a model is asked."""
    first, *others = exchanges
    later = tuple(
        Question(
            list(tokenizer(each.ask, add_special_tokens=False)["input_ids"]),
            each.max_tokens,
            each.answers,
            not each.answers,
        )
        for each in others
    )
    ids = list(tokenizer(first.ask)["input_ids"])
    return Problem(ids, first.max_tokens, first.answers, not first.answers, later)


def fitted(
    write: Callable[[Writer], list[Exchange]],
    seed: str,
    material: Material,
    tokenizer: Any,
    context: int,
) -> list[Exchange]:
    """Return a problem whose first question ends within `context` tokens.

    Args:
        write: Writes it, the same for the same draws.
        seed: Of the draws.
        material: What the text is made of.
        tokenizer: Counts.
        context: Most tokens.
    """
    room = context
    while True:
        writer = Writer(random.Random(seed), material, tokenizer, room)
        exchanges = write(writer)
        over = len(tokenizer(exchanges[0].ask)["input_ids"]) - context
        # a text may have more tokens than its lines
        if over <= 0:
            return exchanges
        room -= over
