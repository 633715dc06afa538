# SPDX-License-Identifier: Apache-2.0
"""What a task asks of a model, and how an answer is scored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One prompt and what its continuation must tell.

    Attributes:
        token_ids: The prompt.
        max_tokens: Most tokens of the answer.
        answers: The strings asked for.
    """

    token_ids: list[int]
    max_tokens: int
    answers: tuple[str, ...]

    def score(self, text: str) -> float:
        """Return the share of the answers that a continuation names, as RULER does."""
        said = text.lower()
        return sum(answer.lower() in said for answer in self.answers) / len(
            self.answers
        )
