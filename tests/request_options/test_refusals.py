# SPDX-License-Identifier: Apache-2.0
"""Options that cannot be had together, or of this server, are refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.request_options.planning import refusal, row

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
    # in mode "both", too, it is more than the server allows
    "generation-max-budget": (
        *({"mode": "generation", "budget": 528}, {}, 100, "mode", "'generation'"),
        (
            "max_budget = 512. Use a budget of at most 400, "
            'or mode "both" with a budget of at most 512.'
        ),
    ),
    "generation-max-budget-long-prompt": (
        *({"mode": "generation", "budget": 528}, {}, 500, "mode", "'generation'"),
        'max_budget = 512. Use mode "both" with a budget of at most 512.',
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
