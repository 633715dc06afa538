# SPDX-License-Identifier: Apache-2.0
"""Tasks that ask several things of one text, one after the other, or after a pause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.quality.tasks.common_words import write_common_words
from benchmarks.quality.tasks.exchange import (
    PAUSE_TOKENS,
    Exchange,
    Generator,
    Writer,
    fitted,
    to_problem,
    with_a_pause,
)
from benchmarks.quality.tasks.material import report_material
from benchmarks.quality.tasks.multikey import write_multikey
from benchmarks.quality.tasks.multivalue import write_multivalue
from benchmarks.quality.tasks.needles import write_needles
from benchmarks.quality.tasks.problem import Problem
from benchmarks.quality.tasks.variables import write_variables

GENERATORS: dict[str, Generator] = {
    "needle": write_needles,
    "multikey": write_multikey,
    "multivalue": write_multivalue,
    "variables": write_variables,
    "common_words": write_common_words,
}
"""What writes texts and questions about them."""
_EXCHANGE_TOKENS = 128
"""More than an answer and the next question take."""
RETRIEVAL = ("needle", "multikey", "multivalue")
"""Of those, the ones with more than one question."""


@dataclass(frozen=True)
class Form:
    """How a text is asked about.

    Attributes:
        generator: One of `GENERATORS`.
        questions: One after the other.
        pause: Whether the model writes a story before the first of them.
    """

    generator: str
    questions: int = 1
    pause: bool = False

    @property
    def tokens_behind(self) -> int:
        """Most tokens between the first question and the last answer."""
        exchanges = self.questions - 1 + self.pause
        return exchanges * _EXCHANGE_TOKENS + self.pause * PAUSE_TOKENS

    def write(self, writer: Writer) -> list[Exchange]:
        """Return one problem as text."""
        exchanges = GENERATORS[self.generator](writer, self.questions)
        return with_a_pause(exchanges, writer) if self.pause else exchanges


CONVERSATIONS = {
    **{name: Form(name) for name in GENERATORS if name != "needle"},
    **{
        f"{name}, {questions} questions": Form(name, questions)
        for name in RETRIEVAL
        for questions in (2, 4)
    },
    **{f"{name}, later": Form(name, pause=True) for name in RETRIEVAL},
}
"""Tasks by name. `later` is after 1,024 tokens that the model writes."""


def build_conversations(
    name: str, tokenizer: Any, context: int, n: int, seed: int
) -> list[Problem]:
    """Return `n` problems of one of `CONVERSATIONS`.

    Args:
        name: Of the task.
        tokenizer: A fast Hugging Face tokenizer.
        context: Most tokens of the text and the first question, or of what comes
            before a story.
        n: Number of problems.
        seed: Chooses all that is drawn. Words and text are those of reports.
    """
    form = CONVERSATIONS[name]
    texts = (
        fitted(
            form.write,
            # the same texts however they are asked about
            f"{form.generator} {seed} {index}",
            report_material(),
            tokenizer,
            context,
        )
        for index in range(n)
    )
    return [to_problem(tokenizer, exchanges) for exchanges in texts]
