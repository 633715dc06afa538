# SPDX-License-Identifier: Apache-2.0
"""Passkey in filler: the published prompt, the key at evenly spread depths."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.tasks.problem import Problem
from tools.passkey import build_passkey

_ANSWER_TOKENS = 8


def build_passkeys(tokenizer: Any, context: int, n: int, seed: int) -> list[Problem]:
    """Return `n` prompts with keys of their own; the depth grows from 0 to 1."""
    passkeys = [
        build_passkey(
            tokenizer, num_tokens=context, depth=(index + 0.5) / n, seed=seed + index
        )
        for index in range(n)
    ]
    return [Problem(key.token_ids, _ANSWER_TOKENS, (key.key,)) for key in passkeys]
