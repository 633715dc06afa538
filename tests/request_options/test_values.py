# SPDX-License-Identifier: Apache-2.0
"""What is no value of an option is refused, by a message that helps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.request_options.planning import MOST_INTEGER, refusal

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
    ("shield", "mean", '"contribution" or "peak" or "deviation"'),
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
