# SPDX-License-Identifier: Apache-2.0
"""What a task asks of a model, and how an answer is scored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """What is read next in a conversation, and what its continuation must tell.

    Attributes:
        token_ids: Read behind all that was said before.
        max_tokens: Most tokens of the answer.
        answers: The strings asked for; none where the model only is to write.
        to_the_end: Whether `max_tokens` are written, whatever the model thinks.
    """

    token_ids: list[int]
    max_tokens: int
    answers: tuple[str, ...]
    to_the_end: bool = False

    def score(self, text: str) -> float:
        """Return the share of the answers that a continuation names, as RULER does."""
        said = text.lower()
        return sum(answer.lower() in said for answer in self.answers) / len(
            self.answers
        )


@dataclass(frozen=True)
class Problem(Question):
    """A prompt, the first question in it, and those that follow in the conversation.

    Attributes:
        later: What is asked after the first answer, one after the other.
    """

    later: tuple[Question, ...] = ()

    @property
    def questions(self) -> tuple[Question, ...]:
        """All of them in their order, this one first."""
        return (self, *self.later)
