# SPDX-License-Identifier: Apache-2.0
"""The passkey task: a number hidden in filler text, asked for at the end.

The prompt is the published one of Mohtashami and Jaggi, "Landmark Attention"
(arXiv 2305.16300), in plain text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and "
    "memorize it. I will quiz you about the important information there."
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    "back again."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
SECOND_QUESTION = "Which number was I told to remember? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """One prompt and what it asks for.

    Attributes:
        text: The prompt.
        token_ids: The prompt as the tokenizer encodes it by default.
        key: The five-digit number to be found.
        needle: Positions in `token_ids` of the needle's tokens.
    """

    text: str
    token_ids: list[int]
    key: str
    needle: range

    def is_answered_by(self, completion: str) -> bool:
        """Return whether a continuation of the prompt starts with the key."""
        return completion.strip().startswith(self.key)

    def asked_again(self, tokenizer: Any) -> Passkey:
        """Return the same text with `SECOND_QUESTION` in the place of `QUESTION`."""
        text = self.text.removesuffix(QUESTION) + SECOND_QUESTION
        return replace(self, text=text, token_ids=list(tokenizer(text)["input_ids"]))


def build_passkey(
    tokenizer: Any, *, num_tokens: int, depth: float, seed: int
) -> Passkey:
    """Build the longest prompt of whole lines that has at most `num_tokens` tokens.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        num_tokens: Most tokens of the prompt; it is shorter by less than a filler line.
        depth: Share of the filler that comes before the needle, 0 to 1.
        seed: Chooses the key.

    Raises:
        ValueError: `depth` is out of range, or `num_tokens` leaves no room for task,
            needle and question.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth = {depth} is not a number from 0 to 1.")
    key = str(random.Random(seed).randint(10_000, 99_999))
    bare, line = (len(_encode(tokenizer, *_lines(key, n, depth))[0]) for n in (0, 1))
    num_fillers = (num_tokens - bare) // (line - bare)
    if num_fillers < 0:
        raise ValueError(
            f"num_tokens = {num_tokens} is less than the {bare} tokens that task, "
            "needle and question take. Raise num_tokens."
        )
    before, needle, after = _lines(key, num_fillers, depth)
    token_ids, positions = _encode(tokenizer, before, needle, after)
    return Passkey(before + needle + after, token_ids, key, positions)


def _lines(key: str, num_fillers: int, depth: float) -> tuple[str, str, str]:
    """Return the text before the needle, the needle, and the text behind it."""
    num_before = round(depth * num_fillers)
    filler = f"{FILLER}\n"
    return (
        f"{TASK}\n{filler * num_before}",
        NEEDLE.format(key=key),
        f"\n{filler * (num_fillers - num_before)}{QUESTION}",
    )


def _encode(
    tokenizer: Any, before: str, needle: str, after: str
) -> tuple[list[int], range]:
    encoded = tokenizer(before + needle + after)
    first = encoded.char_to_token(len(before))
    last = encoded.char_to_token(len(before) + len(needle) - 1)
    return list(encoded["input_ids"]), range(first, last + 1)
