# SPDX-License-Identifier: Apache-2.0
"""What the demo asks: a number hidden in a long text, and a few long texts to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tools.demo.errors import DemoError
from tools.passkey import Passkey, build_passkey

_LICENSE = Path(__file__).parents[2] / "LICENSE"
_DEPTH = 0.35
_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        name: What the table and the picture call it.
        token_ids: The prompt.
        max_tokens: Tokens to write.
        passkey: What it has to find; None for a free text.
    """

    name: str
    token_ids: list[int]
    max_tokens: int
    passkey: Passkey | None = None


@dataclass(frozen=True)
class Prompts:
    """What is sent, in this order; the generations at once.

    Attributes:
        warm_up: Short, so that what the server compiles on first use is not timed.
        passkey: The number hidden in a long text.
        generations: Continue the text of the project's license, cut at different
            lengths up to the budget: what they give back, they give back while they
            write.
    """

    warm_up: Prompt
    passkey: Prompt
    generations: list[Prompt]


def build_prompts(
    model: str, *, prompt_tokens: int, generations: int, tokens: int, budget: int
) -> Prompts:
    """Return the prompts, as the model's tokenizer encodes them.

    Raises:
        DemoError: `prompt_tokens` is too short for the passkey task, or the model's
            tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        passkey = build_passkey(
            tokenizer, num_tokens=prompt_tokens, depth=_DEPTH, seed=0
        )
    except (OSError, ValueError) as error:
        raise DemoError(str(error)) from error
    text = tokenizer(_LICENSE.read_text(encoding="utf-8"))["input_ids"]
    return Prompts(
        warm_up=Prompt("warm-up", text[:32], max_tokens=4),
        passkey=Prompt("passkey", passkey.token_ids, _ANSWER_TOKENS, passkey),
        generations=[
            Prompt(
                f"generation {number}",
                text[: max(1, budget * number // generations)],
                tokens,
            )
            for number in range(1, generations + 1)
        ],
    )
