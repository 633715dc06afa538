# SPDX-License-Identifier: Apache-2.0
"""The budget of a request, in tokens or as a fraction of its prompt."""

from __future__ import annotations

import math
from fractions import Fraction

from vllm_roco.config import MAX_INTEGER, is_integer
from vllm_roco.request_options.asked import Asked
from vllm_roco.request_options.error import (
    RequestOptionError,
    not_allowed,
)


def budget_blocks(asked: Asked, num_prompt_tokens: int, protected_blocks: int) -> int:
    """Return the budget of a request that evicts, in blocks.

    Args:
        asked: What the request asks for.
        num_prompt_tokens: `P`, the prompt's length.
        protected_blocks: Of sink and recent, beside which a fraction keeps one more.

    Raises:
        RequestOptionError: It is no budget, no whole blocks, or a fraction for which
            too much is protected.
    """
    budget = asked.value("budget")
    if isinstance(budget, float) and 0 < budget < 1:
        least = (protected_blocks + 1) * asked.block_size
        if least > asked.config.max_budget:
            raise RequestOptionError(
                "budget",
                budget,
                f"sink and recent alone keep {least - asked.block_size} tokens in "
                f"whole blocks of {asked.block_size}, and a budget of {budget} of "
                "the prompt keeps a block more, which is more than this server's "
                f"max_budget = {asked.config.max_budget}. Lower sink or recent.",
            )
        # as it is written: in binary, 0.07 of 1,600 is more than 112
        tokens = Fraction(repr(float(budget))) * num_prompt_tokens
        return max(math.ceil(tokens / asked.block_size), protected_blocks + 1)
    if not is_integer(budget, 1):
        raise not_allowed(
            "budget",
            budget,
            "a whole number of tokens, at least 1, a fraction of the prompt "
            'between 0 and 1, or "full"',
        )
    if budget > MAX_INTEGER:
        raise not_allowed("budget", budget, f"at most {asked.config.max_budget}")
    asked.check_whole_blocks("budget", budget)
    return int(budget) // asked.block_size
