# SPDX-License-Identifier: Apache-2.0
"""Long English prose, for perplexity and free generation.

Tuning and reports read different novels, see `novels/README.md`.
"""

from __future__ import annotations

import lzma
import random
from functools import cache
from pathlib import Path
from typing import Any

FIRST_REPORT_SEED = 50_000
"""Seeds below it are for tuning, and read another novel than seeds from it on."""

_NOVELS = Path(__file__).with_name("novels")


@cache
def novel(seed: int) -> str:
    """Return the whole text that a seed reads."""
    title = "northanger_abbey" if seed < FIRST_REPORT_SEED else "persuasion"
    with lzma.open(_NOVELS / f"{title}.txt.xz", "rt", encoding="utf-8") as file:
        return file.read()


def prose(tokenizer: Any, length: int, n: int, seed: int) -> list[list[int]]:
    """Return `n` passages of exactly `length` tokens, evenly spread over a novel.

    They overlap where `n * length` is more than the novel has (about 100,000 tokens).

    Args:
        tokenizer: A Hugging Face tokenizer.
        length: Tokens of a passage, with those the tokenizer puts in front.
        n: Number of passages.
        seed: Chooses the novel, and where in its share of it each passage begins.

    Raises:
        ValueError: The novel is shorter than a passage.
    """
    bare = list(tokenizer("")["input_ids"])
    tokens = tokenizer(novel(seed), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    room = len(tokens) - (length - len(bare))
    if room < 0:
        raise ValueError(
            f"length = {length} is more than the {len(tokens)} tokens of the novel."
        )
    phase = random.Random(seed).random()
    starts = [int((index + phase) * room / n) for index in range(n)]
    return [bare + tokens[start : start + length - len(bare)] for start in starts]
