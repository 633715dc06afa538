# SPDX-License-Identifier: Apache-2.0
"""What requests of each kind have of a prefix cache, and what empties it.

One engine without one says what each request writes, then one with it serves all tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams
from vllm.outputs import RequestOutput

from tests.engine.engines import Engine, Prompt, running_engine
from tests.engine.final_pages import Ending, run_to_the_end
from tests.engine.prefix_hits import (
    DONOR,
    JUNCTION,
    LAST,
    NUM_NEW,
    SHARED,
    assert_same,
    assert_whole,
)
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt

pytestmark = pytest.mark.engine

SHORT = SHARED[:75]
"""Read before the first eviction, at 128 tokens; others begin with its blocks."""
OWN_BLOCKS = 64
"""Tokens of its full blocks, with which the same prompt may begin."""
SHORT_SIBLING = SHARED[:64] + random_prompt(50, seed=8)
FEW_NEW = 20
"""With so many tokens behind it, the short prompt does not evict."""


@dataclass(frozen=True)
class Expected:
    """What requests write that read all of their prompts.

    Attributes:
        shorts: Of the short prompt and its sibling, past their first eviction.
        ending: Of the donor.
        first: Of the donor, with a single token.
        logprobs: Of all tokens but the first, of both prompts.
        by_other_weights: Of both prompts, when embeddings are rolled by one.
    """

    shorts: list[tuple[int, ...]]
    ending: Ending
    first: Ending
    logprobs: list[torch.Tensor]
    by_other_weights: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> Expected:
    with running_engine(tiny_llama, SMALL_BUDGET) as engine:
        (ending,) = run_to_the_end(engine, [DONOR], NUM_NEW)
        (first,) = run_to_the_end(engine, [DONOR], 1)
        shorts = engine.generate_one_by_one([SHORT, SHORT_SIBLING], NUM_NEW)
        logprobs = [
            logprobs_of(alone(engine, prompt, 1, prompt_logprobs=0))
            for prompt in (SHORT, DONOR)
        ]
        roll_embeddings(engine, 1)
        others = engine.generate_one_by_one([SHORT, DONOR], FEW_NEW)
    return Expected(shorts, ending, first, logprobs, others)


@pytest.fixture(scope="module")
def shared_engine(tiny_llama: Path, expected: Expected) -> Iterator[Engine]:
    with running_engine(tiny_llama, SMALL_BUDGET, enable_prefix_caching=True) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    assert shared_engine.llm.reset_prefix_cache()
    yield shared_engine
    assert_whole(shared_engine)


def alone(
    engine: Engine, prompt: Prompt, max_tokens: int, **sampling: int
) -> RequestOutput:
    (output,) = engine.run([prompt], max_tokens, **sampling)
    return output


def begun_with(engine: Engine, *prompts: Prompt) -> list[int | None]:
    """Return with how many tokens each prompt begins, sent one after the other."""
    return [alone(engine, prompt, FEW_NEW).num_cached_tokens for prompt in prompts]


def logprobs_of(output: RequestOutput) -> torch.Tensor:
    """Return the log-probability of each token of a prompt but the first."""
    tokens, positions = output.prompt_token_ids, output.prompt_logprobs
    assert tokens is not None
    assert positions is not None
    return torch.tensor(
        [
            position[token].logprob
            for token, position in zip(tokens[1:], positions[1:], strict=True)
            if position is not None
        ]
    )


def roll_embeddings(engine: Engine, places: int) -> None:
    """Let each token stand for another one, as far away."""

    def roll(model: torch.nn.Module) -> None:
        embeddings = model.get_submodule("model.embed_tokens").weight
        embeddings.data.copy_(embeddings.data.roll(places, 0))

    engine.llm.apply_model(roll)


def test_several_answers_read_their_prompt_once(engine: Engine) -> None:
    cache = engine.manager.prefix_cache
    assert cache is not None
    saved = cache.store.num_saved_tokens
    (output,) = engine.llm.generate(
        [{"prompt_token_ids": list(DONOR)}],
        SamplingParams(n=4, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    assert len(output.outputs) == 4
    assert cache.store.num_saved_tokens - saved == 3 * LAST


def test_a_hit_before_the_first_eviction_gives_the_same_tokens(
    engine: Engine, expected: Expected
) -> None:
    """Up to there, longer steps come to the same but for rounding."""
    for prompt, tokens, begun in zip(
        [SHORT, SHORT_SIBLING], expected.shorts, [0, OWN_BLOCKS], strict=True
    ):
        output = alone(engine, prompt, NUM_NEW)
        assert tuple(output.outputs[0].token_ids) == tokens
        assert output.num_cached_tokens == begun


def test_statistics_of_a_copy_are_of_the_prefix_alone(
    engine: Engine, expected: Expected
) -> None:
    """The donor goes on; what it measures later is not in the snapshot."""
    (after_more,) = run_to_the_end(engine, [DONOR], NUM_NEW)
    (after_one,) = run_to_the_end(engine, [SHARED[:JUNCTION] + (1,) * 65], 1)
    (again,) = run_to_the_end(engine, [DONOR], 1)
    assert after_more.num_cached_tokens == after_one.num_cached_tokens == 0
    assert again.num_cached_tokens == LAST
    assert_same(again, expected.first)


@pytest.mark.parametrize("is_first", [True, False])
def test_prompt_logprobs_read_all_and_leave_it_to_others(
    engine: Engine, expected: Expected, is_first: bool
) -> None:
    if not is_first:
        assert begun_with(engine, SHORT, DONOR) == [0, 0]
    for prompt, logprobs in zip([SHORT, DONOR], expected.logprobs, strict=True):
        output = alone(engine, prompt, 1, prompt_logprobs=0)
        assert output.num_cached_tokens == 0
        found = logprobs_of(output)
        assert len(found) == len(prompt) - 1
        # float32 sums of other chunks in another order
        torch.testing.assert_close(found, logprobs, atol=1e-4, rtol=0)
    (donor,) = run_to_the_end(engine, [DONOR], NUM_NEW)
    assert donor.num_cached_tokens == LAST
    assert_same(donor, expected.ending)
    assert begun_with(engine, SHORT) == [OWN_BLOCKS]


def reset(engine: Engine) -> None:
    roll_embeddings(engine, 1)
    assert engine.llm.reset_prefix_cache()


def sleep(engine: Engine) -> None:
    # a CPU keeps its memory, but the engine core empties its caches
    engine.llm.sleep(level=2)
    roll_embeddings(engine, 1)
    engine.llm.wake_up()


@pytest.mark.parametrize("forget", [reset, sleep])
def test_other_weights_find_nothing_of_the_old_ones(
    engine: Engine, expected: Expected, forget: Callable[[Engine], None]
) -> None:
    prompts = [SHORT, DONOR]
    assert begun_with(engine, *prompts, *prompts) == [0, 0, OWN_BLOCKS, LAST]
    forget(engine)
    try:
        found = [alone(engine, prompt, FEW_NEW) for prompt in prompts]
        again = begun_with(engine, *prompts)
    finally:
        roll_embeddings(engine, -1)
    assert [output.num_cached_tokens for output in found] == [0, 0]
    tokens = [tuple(output.outputs[0].token_ids) for output in found]
    assert tokens == expected.by_other_weights
    assert again == [OWN_BLOCKS, LAST]
