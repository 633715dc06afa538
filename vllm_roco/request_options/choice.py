# SPDX-License-Identifier: Apache-2.0
"""How a request chooses the blocks that go: the row's flags and its shield."""

from __future__ import annotations

from vllm_roco.eviction_row import (
    SCORE_MEAN,
    SCORE_NONE,
    SCORE_RANDOM,
    SCORE_SUM,
    SHIELD_BY_CONTRIBUTION,
    SHIELD_BY_DEVIATION,
)
from vllm_roco.request_options.asked import Asked
from vllm_roco.request_options.error import RequestOptionError

_SCORES = {
    "roco": SCORE_MEAN,
    "h2o": SCORE_SUM,
    "random": SCORE_RANDOM,
    "recent": SCORE_NONE,
}
_SHIELDS = {
    "contribution": SHIELD_BY_CONTRIBUTION,
    "peak": 0,
    "deviation": SHIELD_BY_DEVIATION,
}


def choice_of_blocks(asked: Asked, budget: int) -> tuple[int, int]:
    """Return the row's flags, and how many blocks are shielded.

    Args:
        asked: What the request asks for.
        budget: In blocks.

    Raises:
        RequestOptionError: The server measures nothing and the policy does, or the
            shield is no share.
    """
    policy = asked.value("policy")
    if not asked.config.measures and policy != asked.config.policy:
        raise RequestOptionError(
            "policy",
            policy,
            f"policy = {policy!r} is not served here: the server runs policy "
            f"{asked.config.policy!r}, which keeps no statistics. Leave policy out.",
        )
    ratio = asked.ratio("shield_ratio")
    flags = _SCORES[policy]
    # the shield is the paper's; the other policies have one stage
    if policy != "roco":
        return flags, 0
    return flags | _SHIELDS[asked.value("shield")], int(ratio * budget)
