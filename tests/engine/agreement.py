# SPDX-License-Identifier: Apache-2.0
"""Compares what an engine did with what the oracle did."""

from __future__ import annotations

from collections.abc import Sequence

from tests.engine.engines import Prompt
from tests.engine.kept_blocks import KeptBlocks
from tests.oracle import OracleResult

CLEAR_TOKEN_MARGIN = 1e-4
"""Least gap of the two largest logits that float32 rounding cannot close."""

CLEAR_EVICTION_MARGIN = 1e-5
"""Least relative gap of two scores that float32 rounding cannot close."""


def assert_agreement(
    prompts: Sequence[Prompt],
    tokens: Sequence[tuple[int, ...]],
    kept: KeptBlocks,
    expected: Sequence[OracleResult],
) -> None:
    """Assert that tokens and kept blocks are the oracle's, and that none was a tie."""
    assert any(oracle.evictions for oracle in expected)
    for prompt, found, oracle in zip(prompts, tokens, expected, strict=True):
        assert min(oracle.token_margins) > CLEAR_TOKEN_MARGIN, "choose another prompt"
        for eviction in oracle.evictions:
            assert eviction.margin > CLEAR_EVICTION_MARGIN, "choose another prompt"
        assert kept.get(tuple(prompt), {}) == {
            eviction.num_computed_tokens: eviction.kept_blocks
            for eviction in oracle.evictions
        }
        assert found == oracle.token_ids
