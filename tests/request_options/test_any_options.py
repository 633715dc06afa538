# SPDX-License-Identifier: Apache-2.0
"""Whatever a client sends is a plan within the limits, or a refusal."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.request_options.planning import MOST_INTEGER, PLANNER, SIZE, planner
from vllm_roco.config import NAMESPACE, SHIELDS, blocks_of
from vllm_roco.eviction_row import NUM_ROW_FIELDS
from vllm_roco.eviction_schedule import NEVER
from vllm_roco.request_options.error import RequestOptionError
from vllm_roco.request_options.names import OPTIONS, PREFIX
from vllm_roco.request_options.planner import RequestPlan, RequestPlanner

numbers = st.one_of(
    st.integers(),
    st.sampled_from([0, 16, 32, 48, 64, 128, 256, 512, 2**31 - 1, 2**31, 10**400]),
    st.integers(1, 40).map(lambda blocks: blocks * SIZE),
    st.floats(),
    st.floats(0, 1),
    st.booleans(),
)
words = st.sampled_from(
    [*("full", "both", "prompt", "generation", "auto"), *("peak", "deviation")]
    + ["roco", "h2o", "random", "recent", "64", "", "{}"]
)
leaves = st.one_of(numbers, words, st.text(max_size=5), st.none())
values = st.one_of(
    leaves,
    leaves,
    st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.text(max_size=3), inner, max_size=3),
        ),
        max_leaves=5,
    ),
)
names = st.sampled_from(OPTIONS)
some_options = st.dictionaries(names, values, max_size=5)
sensible = st.fixed_dictionaries(
    {},
    optional={
        "budget": st.one_of(
            st.integers(1, 40).map(lambda blocks: blocks * SIZE),
            st.floats(0.01, 0.99),
            st.just("full"),
        ),
        "stride": st.integers(1, 40).map(lambda blocks: blocks * SIZE),
        "chunk": st.integers(1, 20).map(lambda blocks: blocks * SIZE),
        "sink": st.integers(0, 100),
        "recent": st.integers(0, 100),
        "mode": st.sampled_from(["both", "prompt", "generation", "auto", "full"]),
        "policy": st.sampled_from(["roco", "h2o", "random", "recent"]),
        "shield": st.sampled_from(SHIELDS),
        "shield_ratio": st.floats(0, 1),
        "seed": st.integers(0, 2**31 - 1),
    },
)
arguments = st.one_of(
    some_options.map(lambda options: {PREFIX + key: options[key] for key in options}),
    some_options.map(lambda options: {NAMESPACE: options}),
    some_options.map(lambda options: {NAMESPACE: json.dumps(options)}),
    sensible.map(lambda options: {NAMESPACE: options}),
    st.dictionaries(
        st.one_of(st.text(max_size=5), names.map(lambda name: PREFIX + name)),
        values,
        max_size=4,
    ),
    values.map(lambda value: {NAMESPACE: value}),
)
servers = st.builds(
    planner,
    mode=st.sampled_from(["both", "prompt", "generation", "auto", "full"]),
    policy=st.sampled_from(["roco", "recent"]),
    max_budget=st.sampled_from([512, 4096]),
)


def check_limits(server: RequestPlanner, planned: RequestPlan, prompt: int) -> None:
    config, row = server.config, planned.row
    assert len(row) == NUM_ROW_FIELDS
    assert all(type(number) is int for number in row)
    assert all(0 <= number <= MOST_INTEGER for number in row)
    assert min(row.resident_blocks, row.stride_blocks) >= 1
    assert planned.chunk % SIZE == 0
    assert SIZE <= planned.chunk <= max(*server.chunk_limits.values(), config.chunk)
    assert row.until in (0, prompt, NEVER)
    if row.until:
        resident = row.resident_blocks * SIZE
        assert resident <= config.max_budget
        assert resident + row.stride_blocks * SIZE <= config.max_budget + config.stride
        protected = blocks_of(row.sink, SIZE) + blocks_of(row.recent, SIZE)
        assert protected <= row.resident_blocks
        assert row.shield_blocks <= row.resident_blocks


@settings(max_examples=500)
@given(servers, arguments, st.integers(1, 5000))
@example(PLANNER, {"roco_mode": "prompt", "roco_budget": 10**400}, 1)
@example(PLANNER, {"roco": {"mode": "full", "stride": 2**31 - 16}}, 1)
def test_any_options_are_a_plan_or_a_refusal(
    server: RequestPlanner, extra_args: dict[str, Any], prompt: int
) -> None:
    """A budget of 400 digits was an OverflowError, an HTTP 500."""
    try:
        planned = server.plan(extra_args, prompt)
    except RequestOptionError as error:
        message = str(error)
        assert message.startswith("roco: ")
        assert len(message) < 700
        # a client can be told
        f"{message} {error.parameter} {error.value}".encode()
        assert (
            error.parameter == NAMESPACE
            or error.parameter.removeprefix(PREFIX) in OPTIONS
        )
    else:
        check_limits(server, planned, prompt)


@given(servers, sensible, st.integers(1, 2000))
def test_both_forms_give_the_same(
    server: RequestPlanner, options: dict[str, Any], prompt: int
) -> None:
    forms: list[dict[str, Any]] = [
        {PREFIX + name: value for name, value in options.items()},
        {NAMESPACE: options},
        {NAMESPACE: json.dumps(options)},
    ]
    found = set()
    for form in forms:
        try:
            found.add(str(server.plan(form, prompt)))
        except RequestOptionError as error:
            found.add(str(error))
    assert len(found) == 1
