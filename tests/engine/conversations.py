# SPDX-License-Identifier: Apache-2.0
"""A conversation whose next turns begin behind its answers, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from tests.engine.engines import Engine, roco_arguments
from tests.engine.final_pages import Ending, run_to_the_end
from tests.engine.prefix_hits import assert_whole
from tests.engine.steps import audited_manager, poisoned_free_blocks
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt

END = 7
CUE = (3, 4)
"""What a template puts behind a question."""
NUM_TURNS, NUM_ASKED, NUM_WRITTEN = 8, 30, 45
"""An answer is longer than a stride, so that something is evicted in most of them."""
NUM_OF_HEADER, NUM_TURNS_BEHIND = 64, 4
"""A header that others share, and the turns of the conversation behind it."""
_OPTIONS = roco_arguments(SMALL_BUDGET)["additional_config"]["roco"]
CHAT: dict[str, Any] = {
    "additional_config": {
        "roco": {
            **_OPTIONS,
            "turn_end_token_ids": [END],
            "answer_start_token_ids": [*CUE],
        }
    }
}


def check_next_turns(start: Callable[..., AbstractContextManager[Engine]]) -> None:
    """Fail unless turns begin behind answers, and end as those that read all.

    Args:
        start: Starts an engine with further arguments of `LLM`.
    """
    with start(**CHAT) as engine:
        expected = _conversations(engine)
    with (
        start(**CHAT, enable_prefix_caching=True) as engine,
        audited_manager(engine),
        poisoned_free_blocks(engine),
    ):
        found = _conversations(engine)
        assert_whole(engine)
    _check_turns(found, expected)


def _conversations(engine: Engine) -> list[Ending]:
    """Return how the turns of two conversations end: alone, and behind a header."""
    alone = _conversation(engine, [], NUM_TURNS, seed=0)
    header = [*_said(NUM_OF_HEADER - 1, seed=100), END]
    # on to another place where a snapshot can be
    for other in range(2):
        engine.run([(*header, *_said(SMALL_BUDGET.chunk + 1, seed=101 + other))], 1)
    return alone + _conversation(engine, header, NUM_TURNS_BEHIND, seed=200)


def _said(num_tokens: int, seed: int) -> list[int]:
    """Return random tokens that end nothing."""
    drawn = random_prompt(2 * num_tokens, seed)
    return [token for token in drawn if token != END][:num_tokens]


def _conversation(
    engine: Engine, text: list[int], num_turns: int, seed: int
) -> list[Ending]:
    """Ask question after question, and return how each turn ends."""
    endings: list[Ending] = []
    for turn in range(num_turns):
        text = [*text, *_said(NUM_ASKED, seed + turn), END, *CUE]
        endings += run_to_the_end(
            engine, [tuple(text)], NUM_WRITTEN, logit_bias={END: -100.0}
        )
        text += [*endings[-1].tokens, END]
    return endings


def _check_turns(found: list[Ending], expected: list[Ending]) -> None:
    for ending, other in zip(found, expected, strict=True):
        assert ending.tokens == other.tokens
        pages = (np.frombuffer(each.pages, np.float32) for each in (ending, other))
        np.testing.assert_allclose(*pages, rtol=2e-3, atol=2e-4)
    # the token that was written last has not been read, nor the one behind it
    turn = NUM_ASKED + 1 + len(CUE) + NUM_WRITTEN + 1
    begun = [number * turn - 2 for number in range(2, NUM_TURNS)]
    # nothing evicts in the first turn; the second was read for the third one's sake
    assert [ending.num_cached_tokens for ending in found[:NUM_TURNS]] == [0, 0, *begun]
    # behind a header that others have left, the first one was read for those behind it
    begun = [NUM_OF_HEADER + number * turn - 2 for number in range(1, NUM_TURNS_BEHIND)]
    behind = [ending.num_cached_tokens for ending in found[NUM_TURNS:]]
    assert behind == [NUM_OF_HEADER, *begun]
