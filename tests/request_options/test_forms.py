# SPDX-License-Identifier: Apache-2.0
"""Options are read in each form, and what is none of them is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.request_options.planning import PLANNER
from vllm_roco.eviction_row import SCORE_MEAN, EvictionRow
from vllm_roco.eviction_schedule import NEVER
from vllm_roco.request_options.error import RequestOptionError
from vllm_roco.request_options.forms import options_in
from vllm_roco.request_options.planner import RequestPlan


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
