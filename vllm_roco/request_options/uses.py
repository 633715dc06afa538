# SPDX-License-Identifier: Apache-2.0
"""Whether each option that a request brings does anything."""

from __future__ import annotations

from vllm_roco.config import spell
from vllm_roco.request_options.asked import Asked
from vllm_roco.request_options.error import RequestOptionError
from vllm_roco.request_options.names import FULL

_OF_EVICTION = (
    *("stride", "sink", "recent"),
    *("shield", "shield_ratio", "policy", "seed"),
)
"""What a request that evicts nothing has no use for."""

_READERS = {"shield": "roco", "shield_ratio": "roco", "seed": "random"}
"""The policy that reads an option, of those that not all read."""


def check_uses(asked: Asked, mode: str) -> None:
    """Raise if an option would do nothing, and is not the server's own anyway.

    Args:
        asked: What the request asks for.
        mode: That holds for it.

    Raises:
        RequestOptionError: One would.
    """
    policy = asked.value("policy")
    for name, value in asked.options.items():
        if value == (0 if name == "seed" else getattr(asked.config, name)):
            continue
        if mode == FULL and name in _OF_EVICTION:
            why = "nothing is evicted: "
            if "mode" in asked:
                why += "mode = 'full'"
            elif "budget" in asked:
                why += "budget = 'full'"
            else:
                why += "mode = 'full' (the server's default)"
            other = "ask for a mode that evicts"
        elif policy != (reader := _READERS.get(name, policy)):
            why = f"policy = {policy!r}{asked.whose('policy')} does not read it"
            other = f'use policy "{reader}"' if asked.config.measures else ""
        else:
            continue
        cure = f"Leave {name} out{f', or {other}' if other else ''}."
        raise RequestOptionError(
            name,
            value,
            f"{name} = {spell(value)} would do nothing, for {why}. {cure}",
        )
