# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a prompt are read at a time, at one peak of memory for all paces.

The idea is to read easy text in long steps and hard text in short ones. A step attends
over what is kept, what is not evicted yet and its own tokens, so that a longer step
leaves less for the budget. Whether a prompt is easy is told by the prompt alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise

STRIDE = 64
"""Tokens evicted at a time."""
FIXED = (64, 128, 256, 512)
"""Tokens a step, for every prompt."""
SHORT, LONG = 128, 512
"""Tokens a step where a prompt chooses."""
EASY_BELOW = 0.35
"""Novelty of prompts that are called easy; told apart on seeds that no report reads."""
CHOSEN = ("long where easy", "long where hard", "at random")
PACES = (*map(str, FIXED), *CHOSEN)


def novelty(prompt: Sequence[int]) -> float:
    """Return the share of neighbouring tokens that are not side by side before.

    Args:
        prompt: Token ids, at least two.
    """
    pairs = list(pairwise(prompt))
    return len(set(pairs)) / len(pairs)


def chunk_of(pace: str, prompt: Sequence[int]) -> int:
    """Return the tokens of a step.

    Args:
        pace: One of `PACES`.
        prompt: Token ids.

    Raises:
        ValueError: There is no such pace.
    """
    if pace not in PACES:
        raise ValueError(f"pace = {pace!r} is not one of {', '.join(PACES)}.")
    if pace.isdigit():
        return int(pace)
    if pace == "at random":
        return (SHORT, LONG)[zlib.crc32(str(list(prompt)).encode()) % 2]
    is_easy = novelty(prompt) < EASY_BELOW
    return LONG if is_easy == (pace == "long where easy") else SHORT


def options(pace: str, memory: int, prompt: Sequence[int]) -> dict[str, int]:
    """Return what a request asks for.

    Args:
        pace: One of `PACES`.
        memory: Most tokens that a step of the prompt attends over.
        prompt: Token ids.
    """
    chunk = chunk_of(pace, prompt)
    stride = min(STRIDE, chunk)
    return {"budget": memory - stride - chunk, "stride": stride, "chunk": chunk}
