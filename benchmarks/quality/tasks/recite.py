# SPDX-License-Identifier: Apache-2.0
"""Running sums of running sums: what was written is needed again, far behind.

A list of words with a digit each is read. The model writes the words again with the
running sums of the digits, and then once more with the running sums of those sums, each
modulo 10. The second time it needs what it wrote the first time, a third of the text
before. Each line is judged by the lines it follows from, as the model wrote them, so
that one mistake is one mistake.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.tasks.exchange import Exchange, Writer, fitted
from benchmarks.quality.tasks.material import report_material
from benchmarks.quality.tasks.problem import Problem

TEXT = (
    "Below is a list of words and digits. Write the words with the running sum of the "
    "digits, of which only the last digit counts. Then write them again with the "
    "running sum of those sums.\n{text}\nSums:\n"
)
AGAIN = "Sums of sums:"

_PARTS = 3
"""The list, its sums, and their sums: all about equally long."""


def write_recite(writer: Writer, questions: int = 1) -> list[Exchange]:
    """Return a list and the sums that follow from it.

    Args:
        writer: Draws words and digits; its room is that of the list.
        questions: There is only one.
    """
    draw = writer.draw
    words = draw.sample(writer.material.words, len(writer.material.words))
    lines = writer.fill((f"{word} + {draw.randrange(10)}\n" for word in words), TEXT)
    words = words[: len(lines)]
    digits = [int(line.split()[-1]) for line in lines]
    sums = list(_sums(digits))
    first = [f"{word}: {value}" for word, value in zip(words, sums, strict=True)]
    second = [
        f"{word} = {value}" for word, value in zip(words, _sums(sums), strict=True)
    ]
    ask = TEXT.format(text="".join(lines).rstrip("\n"))
    reply = "\n".join([*first, AGAIN, *second])
    return [Exchange(ask, reply, tuple(words), writer.room * (_PARTS - 1))]


@dataclass(frozen=True)
class Recital(Problem):
    """A list whose words are `answers`, in their order."""

    def score(self, text: str) -> float:
        """Return the share of the second sums that follow from what was written."""
        head, _, tail = text.partition(AGAIN)
        before = [_value(line, ":") for line in head.strip().splitlines()]
        after = [_value(line, "=") for line in tail.strip().splitlines()]
        right, last = 0, 0
        for index, word in enumerate(self.answers[: len(after)]):
            was = before[index] if index < len(before) else None
            said = after[index]
            if said is None:
                break
            if was is not None and was[0] == said[0] == word:
                right += said[1] == (last + was[1]) % 10
            last = said[1]
        return right / len(self.answers)


def build_recite(tokenizer: Any, context: int, n: int, seed: int) -> list[Problem]:
    """Return `n` problems whose list and answer take `context` tokens.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        context: Most tokens of a prompt and of what is written.
        n: Number of problems.
        seed: Chooses words and digits.
    """
    room = context // _PARTS
    problems: list[Problem] = []
    for index in range(n):
        (exchange,) = fitted(
            lambda writer: write_recite(writer),
            f"recite {seed} {index}",
            report_material(),
            tokenizer,
            room,
        )
        ids = list(tokenizer(exchange.ask)["input_ids"])
        most = context - room
        problems.append(Recital(ids, most, exchange.answers))
    return problems


def _sums(digits: list[int]) -> Iterator[int]:
    return itertools.accumulate(digits, lambda total, digit: (total + digit) % 10)


def _value(line: str, sign: str) -> tuple[str, int] | None:
    word, found, digit = line.partition(sign)
    digit = digit.strip()
    if not found or len(digit) != 1 or not digit.isdigit():
        return None
    return word.strip(), int(digit)
