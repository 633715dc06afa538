# SPDX-License-Identifier: Apache-2.0
"""An option that would do nothing is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.request_options.planning import refusal, row

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
