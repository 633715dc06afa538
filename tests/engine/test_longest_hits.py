# SPDX-License-Identifier: Apache-2.0
"""A next turn goes on from what its conversation kept, with `prefix_hits: longest`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.engines import roco_arguments, running_engine
from tests.engine.steps import poisoned_free_blocks
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt

pytestmark = pytest.mark.engine

PROMPTS = [random_prompt(length, seed=length) for length in (300, 170, 60)]
"""The last one evicts while its answer is written, the others before."""
# more than a stride, and then less than what is left of one
NUM_FIRST, NUM_MORE = 90, 9


def test_an_answer_goes_on_as_if_it_had_not_ended(
    tiny_llama: Path, asynchronous: None
) -> None:
    """Cut in two, the second half asked for with the first in its prompt."""
    with running_engine(tiny_llama, SMALL_BUDGET) as engine:
        whole = engine.generate(PROMPTS, NUM_FIRST + NUM_MORE)
    (options,) = roco_arguments(SMALL_BUDGET)["additional_config"].values()
    with (
        running_engine(
            tiny_llama,
            SMALL_BUDGET,
            enable_prefix_caching=True,
            additional_config={"roco": {**options, "prefix_hits": "longest"}},
        ) as engine,
        poisoned_free_blocks(engine),
    ):
        first = engine.generate(PROMPTS, NUM_FIRST)
        assert [list(tokens) for tokens in first] == [
            list(tokens[:NUM_FIRST]) for tokens in whole
        ]
        turns = [
            [*prompt, *tokens] for prompt, tokens in zip(PROMPTS, first, strict=True)
        ]
        outputs = engine.run(turns, NUM_MORE)
        for output, turn, tokens in zip(outputs, turns, whole, strict=True):
            assert output.num_cached_tokens == (len(turn) - 1) // 16 * 16
            found = list(output.outputs[0].token_ids)
            assert found == list(tokens[NUM_FIRST:])
        assert engine.num_lost_blocks == 0
