# SPDX-License-Identifier: Apache-2.0
"""With which tokens a model's chat template begins an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_roco.answers import Answers, turn_lengths
from vllm_roco.config import is_integer

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from vllm.config import ModelConfig

    from vllm_roco.config import RocoConfig

logger = init_logger(f"vllm.{__name__}")

_QUESTIONS = "Where is it?", "How many are there, then"
_ANSWER = "Over there."
_REASONED_ANSWER = f"<think>\nThey ask for a place.\n</think>\n\n{_ANSWER}"


def answer_start_token_ids(
    config: RocoConfig, model_config: ModelConfig, turn_ends: Collection[int]
) -> tuple[int, ...]:
    """Return the tokens behind which an answer begins, in a prompt of several turns.

    By default what the tokenizer's chat template puts between a question and its
    answer, without what ends the question. Where there is a tokenizer, the engine core
    has loaded it for structured outputs.

    Args:
        config: The options.
        model_config: vLLM's.
        turn_ends: Tokens that end a turn.

    Returns:
        Token ids, in order; none where answers cannot be told from what they answer, or
        a later prompt has not all that was asked for or written: an opened `<think>`,
        or the reasoning.
    """
    if config.answer_start_token_ids is not None:
        return config.answer_start_token_ids if turn_ends else ()
    try:
        tokenizer = cached_tokenizer_from_config(model_config)
        if tokenizer is None:
            return ()
        return _of_template(tokenizer, turn_ends)
    # a template is a program of strangers, and may raise what it likes
    except Exception as error:
        logger.debug("No chat template tells where answers begin: %s", error)
        return ()


def _of_template(tokenizer: Any, turn_ends: Collection[int]) -> tuple[int, ...]:
    """Return them as a chat template has them: how the prompts of two questions end."""
    first, other = (_rendered(tokenizer, [question]) for question in _QUESTIONS)
    width = _common(first[::-1], other[::-1])
    start = first[len(first) - width :]
    behind = [place for place, token in enumerate(start, 1) if token in turn_ends]
    start = start[behind[-1] :] if behind else start
    # the next turn must have the answer where it was written, and its end
    both, reasoned = (
        _rendered(tokenizer, [_QUESTIONS[0], answer, _QUESTIONS[1]])
        for answer in (_ANSWER, _REASONED_ANSWER)
    )
    tokens = np.array(both, dtype=np.int64)
    found = Answers.of(tokens, start, turn_lengths(tokens, turn_ends))
    is_there = both[: len(first)] == first and found.starts[:1] == (len(first),)
    is_whole = len(found.written_ends) == 1 and reasoned != both
    return tuple(start) if is_there and is_whole else ()


def _rendered(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the prompt that asks for an answer to questions, answers between them."""
    roles = ("user", "assistant")
    messages = [
        {"role": roles[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]
    tokens = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    if not all(is_integer(token, 0) for token in tokens):
        raise TypeError(f"the template made {type(tokens).__name__}, not token ids")
    return list(tokens)


def _common(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return with how many equal tokens both begin."""
    width = 0
    while width < min(len(tokens), len(others)) and tokens[width] == others[width]:
        width += 1
    return width
