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
        expected = _conversation(engine)
    with (
        start(**CHAT, enable_prefix_caching=True) as engine,
        audited_manager(engine),
        poisoned_free_blocks(engine),
    ):
        found = _conversation(engine)
        assert_whole(engine)
    _check_turns(found, expected)


def _conversation(engine: Engine) -> list[Ending]:
    """Ask question after question, and return how each turn ends."""
    text: list[int] = []
    endings: list[Ending] = []
    for turn in range(NUM_TURNS):
        said = random_prompt(2 * NUM_ASKED, seed=turn)
        text += [token for token in said if token != END][:NUM_ASKED]
        text += [END, *CUE]
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
    assert [ending.num_cached_tokens for ending in found] == [0, 0, *begun]
