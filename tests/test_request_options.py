# SPDX-License-Identifier: Apache-2.0
"""What a request asks for becomes a row of integers, or a message that helps."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_roco.config import NAMESPACE, RocoConfig, blocks_of
from vllm_roco.eviction_row import (
    NUM_ROW_FIELDS,
    SCORE_MEAN,
    SCORE_NONE,
    SCORE_RANDOM,
    SCORE_SUM,
    SHIELD_BY_DEVIATION,
    EvictionRow,
)
from vllm_roco.eviction_schedule import NEVER
from vllm_roco.request_options import (
    OPTIONS,
    PREFIX,
    RequestOptionError,
    RequestPlan,
    RequestPlanner,
    options_in,
)

SIZE = 16
SERVER = RocoConfig(
    budget=256, stride=64, chunk=128, max_budget=512, allow_full=True, shield_ratio=0.5
)
LIMITS = {"--one less --another": 300, "--third": 400}
PLANNER = RequestPlanner(SERVER, SIZE, LIMITS)
MOST_INTEGER = 2**31 - 1


def planner(**changes: Any) -> RequestPlanner:
    config = dataclasses.replace(SERVER, **changes)
    return dataclasses.replace(PLANNER, config=config)


def plan(
    options: Mapping[str, Any] | None = None, prompt: int = 100, **server: Any
) -> RequestPlan:
    return planner(**server).plan({NAMESPACE: options or {}}, prompt)


def row(
    options: Mapping[str, Any] | None = None, prompt: int = 100, **server: Any
) -> EvictionRow:
    return plan(options, prompt, **server).row


def refusal(
    options: Mapping[str, Any], prompt: int = 100, **server: Any
) -> RequestOptionError:
    with pytest.raises(RequestOptionError) as error:
        plan(options, prompt, **server)
    return error.value


# forms


@pytest.mark.parametrize("nothing", [None, {}, {"other": 1}, {"roco": {}}], ids=repr)
def test_a_request_without_options_has_the_servers(nothing: Any) -> None:
    assert PLANNER.plan(nothing, 100) == RequestPlan(
        EvictionRow(16, 4, NEVER, 16, 32, 8, SCORE_MEAN, 0), chunk=128
    )


@pytest.mark.parametrize(
    "extra_args",
    [
        {"roco_budget": 128, "roco_sink": 0, "other": 5, "rocobudget": 1},
        {"roco": {"budget": 128, "sink": 0}, 7: "a key that is no string"},
        {"roco": '{"budget": 128, "sink": 0}'},
    ],
    ids=["flat", "dictionary", "json"],
)
def test_forms(extra_args: dict[Any, Any]) -> None:
    assert options_in(extra_args) == {"budget": 128, "sink": 0}


BAD_FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "both": (
        {"roco": {"sink": 0}, "roco_budget": 64},
        "the request has both roco = {'sink': 0} and roco_budget. Use one form",
    ),
    "list": ({"roco": [64]}, "roco = [64] is not a dictionary of options. Use one,"),
    "none": ({"roco": None}, "roco = None is not a dictionary"),
    "no-json": ({"roco": "budget=64"}, "roco = 'budget=64' is not a dictionary"),
    "json-number": ({"roco": "64"}, "roco = 64 is not a dictionary"),
    "deep-json": ({"roco": "[" * 100_000}, "... is not a dictionary"),
    "huge-json": ({"roco": '{"budget": 1' + "0" * 5000 + "}"}, "is not a dictionary"),
    "unknown": ({"roco_buget": 64}, "unknown option 'buget' = 64 in a request."),
    "unknown-nested": ({"roco": {"trace": "/x"}}, "unknown option 'trace' = '/x'"),
    "server-only": ({"roco_max_budget": 64}, "Allowed are budget, stride, chunk, sink"),
    "row": ({"roco_row": [0] * 8}, "unknown option 'row'"),
    "surrogate": ({"roco": '{"\\ud800": 1}'}, r"unknown option '\ud800' = 1"),
}


@pytest.mark.parametrize(("extra_args", "says"), BAD_FORMS.values(), ids=BAD_FORMS)
def test_bad_forms_are_refused(extra_args: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestOptionError) as error:
        PLANNER.plan(extra_args, 100)
    assert says in str(error.value)
    assert error.value.parameter == "roco"


# values

WHOLE = "a whole number of tokens, at least"
BUDGET = f'{WHOLE} 1, a fraction of the prompt between 0 and 1, or "full"'
BAD_VALUES: list[tuple[str, Any, str]] = [
    *[
        ("budget", value, BUDGET)
        for value in (0, -16, 1.0, 0.0, -0.5, 64.0, 1e308, "64", True, None, [64], {})
    ],
    ("budget", math.nan, BUDGET),
    ("budget", math.inf, BUDGET),
    ("budget", 2**31, "at most 512"),
    ("budget", 10**400, "at most 512"),
    ("stride", 0, f"{WHOLE} 1"),
    ("stride", 16.0, f"{WHOLE} 1"),
    ("stride", 2**31, f"at most {MOST_INTEGER}"),
    ("chunk", "64", f"{WHOLE} 1"),
    ("chunk", -1, f"{WHOLE} 1"),
    ("sink", -1, f"{WHOLE} 0"),
    ("sink", 2**31, f"at most {MOST_INTEGER}"),
    ("recent", 0.5, f"{WHOLE} 0"),
    ("recent", True, f"{WHOLE} 0"),
    ("seed", -1, f"a whole number from 0 to {MOST_INTEGER}"),
    ("seed", 2**31, f"a whole number from 0 to {MOST_INTEGER}"),
    ("seed", "0", f"a whole number from 0 to {MOST_INTEGER}"),
    ("shield_ratio", 1.5, "a number from 0 to 1"),
    ("shield_ratio", math.nan, "a number from 0 to 1"),
    ("shield_ratio", "0.5", "a number from 0 to 1"),
    ("shield_ratio", False, "a number from 0 to 1"),
    ("shield", "mean", '"peak" or "deviation"'),
    ("policy", "tova", '"roco" or "h2o" or "random" or "recent"'),
    ("policy", ["roco"], '"roco" or "h2o" or "random" or "recent"'),
    ("mode", "none", '"both" or "prompt" or "generation" or "auto" or "full"'),
    ("mode", None, '"both" or "prompt" or "generation" or "auto" or "full"'),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD_VALUES)
def test_bad_values_are_refused(name: str, value: Any, allowed: str) -> None:
    error = refusal({name: value})
    assert error.parameter == f"roco_{name}"
    assert str(error).startswith(f"roco: {name} = ")
    assert str(error).endswith(f" is not allowed in a request. Use {allowed}.")
    if len(repr(value)) <= 100:
        assert f" = {value!r} is" in str(error)


def test_what_is_long_is_cut_short() -> None:
    error = refusal({"mode": "x" * 10_000})
    assert len(str(error)) < 300
    assert len(str(error.value)) < 110
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert "<list, too long to print>" in str(refusal({"budget": deep}))
    assert "<int, too long to print>" in str(refusal({"sink": 10**5000}))


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], int, str, Any, str]] = {
    # options, server, prompt, key, value, message
    "block-size": (
        *({"budget": 100}, {}, 100, "budget", 100),
        "budget = 100 is not a multiple of the block size (16 tokens). Use 96 or 112.",
    ),
    "block-size-below-one": (
        *({"stride": 8}, {}, 100, "stride", 8),
        "stride = 8 is not a multiple of the block size (16 tokens). Use 16.",
    ),
    "max-budget": (
        *({"budget": 528}, {}, 100, "budget", 528),
        (
            "budget = 528 is more than this server's max_budget = 512. "
            "Use at most 512, or "
            "ask the operator to raise max_budget."
        ),
    ),
    "max-budget-fraction": (
        *({"budget": 0.9}, {}, 1000, "budget", 0.9),
        (
            "budget = 0.9 of the prompt's 1000 tokens (912 in whole blocks of 16) is "
            "more than this server's max_budget = 512. Use at most 512 tokens, or "
            "0.512 of this prompt, or ask the operator to raise max_budget."
        ),
    ),
    "max-budget-fraction-of-a-very-long-prompt": (
        *({"budget": 0.9}, {}, 1_000_000, "budget", 0.9),
        "max_budget = 512. Use at most 512 tokens, or ask",
    ),
    "generation-fraction": (
        *({"mode": "generation", "budget": 0.9}, {}, 300, "mode", "'generation'"),
        (
            "mode = 'generation' keeps the prompt (300 tokens), and budget = 0.9 of "
            "the prompt's 300 tokens (272 in whole blocks of 16) comes on top: 576 "
            "tokens is more than max_budget = 512. Use a budget of at most 208 tokens, "
            'or 0.693 of this prompt, or mode "both".'
        ),
    ),
    "generation-fraction-beside-protected": (
        *({"mode": "generation", "budget": 0.5}, {}, 460, "mode", "'generation'"),
        "Use a budget of at most 48 tokens, or mode",
    ),
    # once the prompt is longer it evicts
    "max-budget-short-prompt": (
        *({"budget": 528, "mode": "prompt"}, {}, 1, "budget", 528),
        "budget = 528 is more than this server's max_budget = 512.",
    ),
    "generation": (
        *({"mode": "generation", "budget": 400}, {}, 200, "mode", "'generation'"),
        (
            "mode = 'generation' keeps the prompt (200 tokens), and "
            "budget = 400 comes on "
            "top: 608 tokens is more than max_budget = 512. Use a budget "
            "of at most 304, "
            'or mode "both".'
        ),
    ),
    "generation-long-prompt": (
        *({"mode": "generation"}, {}, 500, "mode", "'generation'"),
        (
            "(500 tokens), and budget = 256 (the server's default) comes on top: "
            "768 tokens is more than "
            'max_budget = 512. Use mode "both".'
        ),
    ),
    "stride": (
        *({"budget": 512, "stride": 80}, {}, 100, "stride", 80),
        (
            "stride = 80 on top of 512 kept tokens is more than this "
            "server plans for (576,"
            " its max_budget and stride). Use a stride of at most 64."
        ),
    ),
    "chunk": (
        *({"chunk": 304}, {}, 100, "chunk", 304),
        (
            "chunk = 304 is more than a step of this server has room for beside its "
            "other requests: more than --one less --another (300). Use at most 288, or "
            "ask the operator to raise it."
        ),
    ),
    "chunk-by-two-limits": (
        *({"chunk": 416}, {}, 100, "chunk", 416),
        (
            "more than --one less --another (300) and --third (400). Use at most 288, "
            "or ask the operator to raise them."
        ),
    ),
    "full": (
        *({"mode": "full"}, {"allow_full": False}, 100, "mode", "'full'"),
        (
            "mode = 'full' is not allowed by this server (allow_full). Use mode "
            '"both", "generation" or "auto", or ask the operator.'
        ),
    ),
    "prompt": (
        *({"mode": "prompt"}, {"allow_full": False}, 100, "mode", "'prompt'"),
        "mode = 'prompt' is not allowed by this server (allow_full).",
    ),
    "full-budget": (
        *({"budget": "full"}, {"allow_full": False}, 100, "budget", "'full'"),
        "budget = 'full' is not allowed by this server (allow_full).",
    ),
    "full-and-mode": (
        *({"budget": "full", "mode": "both"}, {}, 100, "mode", "'both'"),
        "budget = \"full\" keeps everything, and mode = 'both' does not. Leave one of",
    ),
    "full-and-budget": (
        *({"budget": 64, "mode": "full"}, {}, 100, "budget", 64),
        "mode = 'full' keeps everything, and budget = 64 does not. Leave one of them",
    ),
    "policy": (
        *({"policy": "roco"}, {"policy": "recent"}, 100, "policy", "'roco'"),
        (
            "policy = 'roco' is not served here: the server runs policy "
            "'recent', which "
            "keeps no statistics. Leave policy out."
        ),
    ),
    "fraction-of-protected": (
        *({"budget": 0.5, "sink": 512}, {}, 100, "budget", 0.5),
        (
            "sink and recent alone keep 544 tokens in whole blocks of "
            "16, and a budget of "
            "0.5 of the prompt keeps a block more"
        ),
    ),
}


@pytest.mark.parametrize(
    ("options", "server", "prompt", "name", "value", "says"),
    REFUSALS.values(),
    ids=REFUSALS,
)
def test_what_does_not_go_together_is_refused(
    options: dict[str, Any],
    server: dict[str, Any],
    prompt: int,
    name: str,
    value: Any,
    says: str,
) -> None:
    error = refusal(options, prompt, **server)
    assert says in str(error)
    assert (error.parameter, error.value) == (f"roco_{name}", value)


def test_protected_tokens_fit_the_budget() -> None:
    assert row({"budget": 64, "sink": 32}).resident_blocks == 4
    error = refusal({"budget": 64, "sink": 33})
    assert (
        "sink = 33 and recent = 32 (the server's default) protect 80 tokens in whole "
        "blocks of 16, more than "
        "the 64 that are kept. Lower them, or raise budget."
    ) in str(error)
    assert (error.parameter, error.value) == ("roco_budget", 64)


# what each option does


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"budget": 128}, {"resident_blocks": 8, "shield_blocks": 4}),
        ({"budget": 512}, {"resident_blocks": 32, "shield_blocks": 16}),
        ({"stride": 16}, {"stride_blocks": 1}),
        ({"stride": 320}, {"stride_blocks": 20}),
        ({"sink": 0}, {"sink": 0}),
        ({"recent": 100}, {"recent": 100}),
        ({"shield": "deviation"}, {"flags": SCORE_MEAN | SHIELD_BY_DEVIATION}),
        ({"shield_ratio": 0.7}, {"shield_blocks": 11}),
        ({"shield_ratio": 1}, {"shield_blocks": 16}),
        ({"policy": "h2o"}, {"flags": SCORE_SUM, "shield_blocks": 0}),
        ({"policy": "recent"}, {"flags": SCORE_NONE, "shield_blocks": 0}),
        (
            {"policy": "random", "seed": 7},
            {"flags": SCORE_RANDOM, "shield_blocks": 0, "seed": 7},
        ),
        ({"chunk": 64}, {}),
        ({"budget": 32, "sink": 0}, {"resident_blocks": 2, "stride_blocks": 2}),
    ],
    ids=repr,
)
def test_an_option_changes_what_it_is_for(
    options: dict[str, Any], changes: dict[str, int]
) -> None:
    expected = row()._replace(**changes)
    if options.get("budget") == 32:
        expected = expected._replace(sink=0, shield_blocks=1)
    assert row(options) == expected


@pytest.mark.parametrize(
    ("options", "chunk"),
    [
        ({}, 128),
        ({"chunk": 288}, 288),
        # no step of a prompt sees more text than the budget, unless it is asked to
        ({"budget": 64, "sink": 0}, 64),
        ({"budget": 64, "sink": 0, "chunk": 128}, 128),
        ({"budget": 0.5}, 64),
    ],
    ids=repr,
)
def test_chunks(options: dict[str, Any], chunk: int) -> None:
    assert plan(options).chunk == chunk


def test_the_servers_own_chunk_is_always_allowed() -> None:
    """Where no prompt is as long as a chunk, steps may be shorter than one."""
    short = dataclasses.replace(PLANNER, chunk_limits={"--one": 100})
    assert short.plan({"roco_chunk": 128}, 50).chunk == 128
    with pytest.raises(RequestOptionError, match="Use at most 128, or"):
        short.plan({"roco_chunk": 144}, 50)


# modes


def test_both_shares_the_budget() -> None:
    for prompt in (1, 100, 10_000):
        assert row({"mode": "both"}, prompt) == row()


def test_prompt_stops_evicting_where_the_answer_begins() -> None:
    planned = row({"mode": "prompt"}, 1000)
    assert planned == row()._replace(until=1000)
    schedule = planned.schedule(SIZE)
    assert schedule.evicted_blocks(10**6) == schedule.evicted_blocks(1000) > 0


@pytest.mark.parametrize(("prompt", "until"), [(319, 0), (320, 320), (1, 0)])
def test_a_prompt_that_never_evicts_is_not_measured(prompt: int, until: int) -> None:
    """The budget and one stride, 256 and 64 tokens, are full at 320."""
    assert row({"mode": "prompt"}, prompt).until == until


@pytest.mark.parametrize("prompt", [1, 16, 17, 200])
def test_generation_keeps_the_prompt(prompt: int) -> None:
    planned = row({"mode": "generation", "budget": 64}, prompt)
    assert planned.resident_blocks == blocks_of(prompt, SIZE) + 4
    assert planned.sink == max(prompt, 16)
    assert planned.until == NEVER
    # a share of the budget, not of the prompt
    assert planned.shield_blocks == 2
    assert planned.schedule(SIZE).evicted_blocks(prompt) == 0


@pytest.mark.parametrize(("prompt", "sink"), [(8, 16), (128, 128), (129, 16)])
def test_auto_keeps_prompts_of_half_a_budget(prompt: int, sink: int) -> None:
    assert row({"mode": "auto"}, prompt) == row()._replace(sink=sink)


@pytest.mark.parametrize("policy", ["h2o", "random", "recent"])
def test_what_a_policy_does_not_read_makes_no_other_row(policy: str) -> None:
    """Requests with other seeds had snapshots of their own."""
    server = {"shield": "deviation", "shield_ratio": 0.9}
    assert row({"policy": policy}, **server) == row({"policy": policy})


EVICTS_NOTHING = "for nothing is evicted: "
IDLE: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    # options, server, what does nothing, message
    (
        *({"seed": 7}, {}, "seed"),
        (
            "roco: seed = 7 would do nothing, for policy = 'roco' (the server's "
            'default) does not read it. Leave seed out, or use policy "random".'
        ),
    ),
    ({"seed": 7, "policy": "h2o"}, {}, "seed", "for policy = 'h2o' does not read it"),
    *[
        (
            *({"shield": "deviation", "policy": policy}, {}, "shield"),
            f"for policy = '{policy}' does not read it. Leave shield out, or use",
        )
        for policy in ("h2o", "random", "recent")
    ],
    (
        *({"shield_ratio": 0.3}, {"policy": "h2o"}, "shield_ratio"),
        "policy = 'h2o' (the server's default) does not read it. Leave shield_",
    ),
    # a policy that would read it cannot be had
    (
        *({"shield": "deviation"}, {"policy": "recent"}, "shield"),
        "(the server's default) does not read it. Leave shield out.",
    ),
    *[
        (
            *({name: value, "mode": "full"}, {}, name),
            f"{EVICTS_NOTHING}mode = 'full'. Leave {name} out, or ask for a mode that",
        )
        for name, value in [
            *[("stride", 32), ("sink", 0), ("recent", 0), ("policy", "h2o")],
            *[("shield", "deviation"), ("shield_ratio", 0.3), ("seed", 7)],
        ]
    ],
    (
        *({"sink": 4, "budget": "full"}, {}, "sink"),
        f"{EVICTS_NOTHING}budget = 'full'. Leave sink out,",
    ),
    (
        *({"stride": 32}, {"mode": "full"}, "stride"),
        f"{EVICTS_NOTHING}mode = 'full' (the server's default). Leave stride out,",
    ),
]


@pytest.mark.parametrize(("options", "server", "name", "says"), IDLE, ids=str)
def test_what_would_do_nothing_is_refused(
    options: dict[str, Any], server: dict[str, Any], name: str, says: str
) -> None:
    """It was taken in silence, and whoever had asked for it could not tell."""
    error = refusal(options, **server)
    assert says in str(error)
    assert str(error).startswith(f"roco: {name} = {options[name]!r} would do nothing, ")
    assert error.parameter == f"roco_{name}"


@pytest.mark.parametrize(
    ("options", "server"),
    [
        ({"seed": 0}, {}),
        ({"shield": "peak", "shield_ratio": 0.5, "policy": "h2o"}, {}),
        ({"mode": "full", "stride": 64, "sink": 16, "policy": "roco", "seed": 0}, {}),
        ({"recent": 32, "budget": "full"}, {}),
        ({"stride": 64}, {"mode": "full"}),
        ({"stride": 32, "budget": 64}, {"mode": "full"}),
        # this one does: it is the least that a step reads
        ({"mode": "full", "chunk": 64}, {}),
    ],
    ids=str,
)
def test_what_the_server_has_anyway_is_taken(
    options: dict[str, Any], server: dict[str, Any]
) -> None:
    row(options, **server)


def test_auto_does_not_protect_more_than_there_is() -> None:
    planned = row({"mode": "auto", "budget": 96, "recent": 80}, 32)
    assert planned.sink == 16


@pytest.mark.parametrize("options", [{"mode": "full"}, {"budget": "full"}], ids=repr)
def test_full_never_evicts(options: dict[str, Any]) -> None:
    planned = row(options)
    assert planned == row()._replace(until=0)
    assert planned.schedule(SIZE).evicted_blocks(10**6) == 0


def test_a_budget_where_the_server_keeps_everything_evicts() -> None:
    """It was left unused in silence."""
    assert row(mode="full").until == 0
    assert row({"budget": 128}, mode="full") == row({"budget": 128})
    assert row({"budget": "full"}, mode="full") == row(mode="full")


@pytest.mark.parametrize("mode", ["both", "prompt", "generation", "auto", "full"])
def test_the_servers_mode_is_the_default(mode: str) -> None:
    assert row(mode=mode) == row({"mode": mode})


@pytest.mark.parametrize(
    ("fraction", "prompt", "blocks"),
    [
        *[(0.5, 320, 10), (0.5, 321, 11), (0.999, 512, 32), (0.25, 1000, 16)],
        # 112 tokens; in binary a little more, which was a block more
        (0.07, 1600, 7),
    ],
)
def test_a_fraction_is_of_the_prompt(fraction: float, prompt: int, blocks: int) -> None:
    for mode in ("both", "prompt", "auto"):
        assert row({"budget": fraction, "mode": mode}, prompt).resident_blocks == blocks


@given(
    st.one_of(
        st.tuples(st.just("both"), st.integers(513, 200_000)),
        st.tuples(st.just("generation"), st.integers(260, 500)),
    )
)
def test_the_fraction_that_is_told_can_be_had(request: tuple[str, int]) -> None:
    mode, prompt = request
    asked = {"budget": 0.999, "mode": mode}
    told = re.search(r"or (0\.\d+) of this prompt", str(refusal(asked, prompt)))
    if told is not None:
        row({**asked, "budget": float(told[1])}, prompt)


@pytest.mark.parametrize("fraction", [1e-300, 0.001, 0.01])
def test_a_fraction_leaves_a_block_beside_the_protected(fraction: float) -> None:
    assert row({"budget": fraction}).resident_blocks == 1 + 2 + 1
    assert row({"budget": fraction, "sink": 0, "recent": 0}).resident_blocks == 1


def test_a_fraction_comes_on_top_of_a_prompt_that_is_kept() -> None:
    planned = row({"budget": 0.5, "mode": "generation"}, 320)
    assert planned.resident_blocks == 20 + 10


# whatever a client sends

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
        "shield": st.sampled_from(["peak", "deviation"]),
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
