# SPDX-License-Identifier: Apache-2.0
"""The mode of a request, which its budget may say as well."""

from __future__ import annotations

from vllm_roco.config import MODES, UNBOUNDED_MODES, spell
from vllm_roco.request_options.asked import Asked
from vllm_roco.request_options.error import RequestOptionError
from vllm_roco.request_options.names import FULL


def mode_of(asked: Asked) -> str:
    """Return the mode that holds for a request.

    Raises:
        RequestOptionError: Mode and budget contradict each other, or the server does
            not serve the mode.
    """
    budget = asked.options.get("budget")
    if "mode" in asked:
        mode: str = asked.options["mode"]
    elif budget == FULL:
        mode = FULL
    elif "budget" in asked and asked.config.mode == FULL:
        # who brings a budget where nothing is evicted wants evictions
        mode = MODES[0]
    else:
        mode = asked.config.mode
    if budget == FULL and mode != FULL:
        raise RequestOptionError(
            "mode",
            mode,
            f'budget = "full" keeps everything, and mode = {mode!r} does not. '
            "Leave one of them out.",
        )
    if mode == FULL and "budget" in asked and budget != FULL:
        raise RequestOptionError(
            "budget",
            budget,
            f"mode = 'full' keeps everything, and budget = {spell(budget)} does "
            "not. Leave one of them out.",
        )
    if mode in UNBOUNDED_MODES and not asked.config.allow_full:
        key = "mode" if "mode" in asked else "budget"
        raise RequestOptionError(
            key,
            mode,
            f"{key} = {mode!r} is not allowed by this server (allow_full). Use "
            'mode "both", "generation" or "auto", or ask the operator.',
        )
    return mode
