# SPDX-License-Identifier: Apache-2.0
"""Which requests could never be served to their end, and what helps."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_roco.config import MODES, RocoConfig
from vllm_roco.eviction_schedule import NEVER
from vllm_roco.request_options.planner import RequestPlan, RequestPlanner
from vllm_roco.request_size import RequestSizes, RequestTooLargeError

SIZE = 16
SERVER = RocoConfig(budget=64, stride=32, chunk=64, max_budget=4096, allow_full=True)
PLANNER = RequestPlanner(SERVER, SIZE)
SIZES = RequestSizes(SIZE, max_steps_in_flight=1, max_model_len=8192)


def plan(mode: str, prompt: int, **more: object) -> RequestPlan:
    return PLANNER.plan({"roco": {"mode": mode, **more}}, prompt)


def fits(mode: str, prompt: int, answer: int, blocks: int, steps: int = 1) -> bool:
    sizes = dataclasses.replace(SIZES, max_steps_in_flight=steps)
    try:
        sizes.resolve(plan(mode, prompt), prompt, answer, blocks)
    except RequestTooLargeError:
        return False
    return True


@given(
    st.sampled_from(MODES),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 300),
    st.integers(1, 3),
)
def test_the_longest_that_is_told_is_the_longest_that_fits(
    mode: str, prompt: int, answer: int, blocks: int, steps: int
) -> None:
    schedule = plan(mode, prompt).row.schedule(SIZE)
    longest = schedule.max_tokens_in(blocks, steps * plan(mode, prompt).chunk)
    assert fits(mode, prompt, answer, blocks, steps) == (prompt + answer <= longest)
    if longest < NEVER and prompt < longest <= SIZES.max_model_len:
        assert fits(mode, prompt, longest - prompt, blocks, steps)


@pytest.mark.parametrize(
    ("mode", "prompt", "answer", "blocks", "parameter", "says"),
    [
        (
            *("full", 100, 900, 40, "max_tokens"),
            (
                "max_tokens = 900 after a prompt of 100 tokens may hold 63 blocks of "
                "16 tokens, but the KV cache has 40, so the request could never be "
                "served to its end. Use a max_tokens of at most 540, or mode"
            ),
        ),
        (
            *("full", 700, 10, 40, "input_tokens"),
            (
                "a prompt of 700 tokens with max_tokens = 10 may hold 45 blocks of 16 "
                "tokens, but the KV cache has 40, so the request could never be "
                "served to its end. Use a prompt and a max_tokens of together at most "
                '640, or mode "both".'
            ),
        ),
        # the budget, the stride, a chunk and a block come to 11
        ("prompt", 1000, 200, 12, "max_tokens", "at most 120, or mode"),
        (
            "both",
            300,
            200,
            10,
            "input_tokens",
            "160, or a smaller budget, stride or ch",
        ),
        (
            *("prompt", 300, 200, 10, "input_tokens"),
            '160, or a smaller budget, stride or chunk, if need be with mode "both".',
        ),
        # mode "both" alone would need 11
        (
            *("full", 100, 200, 10, "max_tokens"),
            'at most 60, or mode "both" with a smaller budget, stride or chunk.',
        ),
        ("full", 100, 200, 11, "max_tokens", 'at most 76, or mode "both".'),
        ("generation", 300, 200, 29, "max_tokens", "at most 164, or a smaller budget"),
    ],
)
def test_what_is_refused_is_told(
    mode: str, prompt: int, answer: int, blocks: int, parameter: str, says: str
) -> None:
    with pytest.raises(RequestTooLargeError, match="^roco: ") as error:
        SIZES.resolve(plan(mode, prompt), prompt, answer, blocks)
    assert says in str(error.value)
    assert error.value.parameter == parameter
    assert error.value.value == (answer if parameter == "max_tokens" else prompt)


@given(
    st.sampled_from(["prompt", "full"]),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 40),
    st.integers(1, 3),
)
def test_a_mode_that_is_told_to_help_does(
    mode: str, prompt: int, answer: int, blocks: int, steps: int
) -> None:
    sizes = dataclasses.replace(SIZES, max_steps_in_flight=steps)
    try:
        sizes.resolve(plan(mode, prompt), prompt, answer, blocks)
    except RequestTooLargeError as error:
        is_told = str(error).endswith(', or mode "both".')
        assert is_told == fits("both", prompt, answer, blocks, steps)


def test_the_models_length_ends_a_request() -> None:
    sizes = dataclasses.replace(SIZES, max_model_len=640)
    assert sizes.resolve(plan("full", 100), 100, 10_000, 40).max_blocks == 40


def test_nothing_is_refused_before_the_memory_is_known() -> None:
    assert SIZES.resolve(plan("full", 100), 100, 10_000, None).max_blocks == 512
