# SPDX-License-Identifier: Apache-2.0
"""The most blocks that a request may hold, worked out from `docs/options.md` alone.

Nothing of the package: what is judged must not judge itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class ServerOptions:
    """What a server was started with, in tokens.

    Attributes:
        budget: Option of RoCo; likewise stride, chunk, sink and recent.
        stride: See `budget`.
        chunk: See `budget`.
        sink: See `budget`.
        recent: See `budget`.
        block_size: Tokens per block.
        steps_in_flight: Steps that may be scheduled but not yet processed.
    """

    budget: int
    stride: int
    chunk: int
    sink: int
    recent: int
    block_size: int
    steps_in_flight: int


@dataclass(frozen=True)
class Bound:
    """Of one request.

    Attributes:
        blocks: The most that it may ever hold.
        first_eviction: Tokens from which on it evicts, None for never.
    """

    blocks: int
    first_eviction: int | None


def bound_of(
    server: ServerOptions,
    extra_args: Mapping[str, Any] | None,
    num_prompt_tokens: int,
    max_tokens: int,
) -> Bound:
    """Return what holds for a request.

    Args:
        server: Its server's options; mode `both`.
        extra_args: What the request brought in `vllm_xargs`.
        num_prompt_tokens: Length of its prompt.
        max_tokens: Most tokens that it generates.
    """
    size = server.block_size

    def blocks(tokens: int) -> int:
        return -(-tokens // size)

    asked = _asked(extra_args or {})
    everything = blocks(num_prompt_tokens + max_tokens)
    budget, mode = asked.get("budget", server.budget), asked.get("mode", "both")
    if mode == "full" or budget == "full":
        return Bound(everything, None)
    if isinstance(budget, float):
        protected = blocks(asked.get("sink", server.sink))
        protected += blocks(asked.get("recent", server.recent))
        kept = math.ceil(Fraction(repr(budget)) * num_prompt_tokens / size)
        kept = max(kept, protected + 1)
    else:
        kept = budget // size
    own = kept * size if "budget" in asked else math.inf
    if mode == "generation":
        kept += blocks(num_prompt_tokens)
    stride = asked.get("stride", min(server.stride, own))
    chunk = asked.get("chunk", min(server.chunk, own))
    most = kept + stride // size + blocks(server.steps_in_flight * chunk) + 1
    first_eviction: int | None = kept * size + stride
    if mode == "prompt":
        strides = max(0, num_prompt_tokens // size - kept) // (stride // size)
        most = max(most, everything - strides * (stride // size))
        if not strides:
            first_eviction = None
    return Bound(min(most, everything), first_eviction)


def _asked(extra_args: Mapping[str, Any]) -> dict[str, Any]:
    if "roco" in extra_args:
        options = extra_args["roco"]
        return json.loads(options) if isinstance(options, str) else dict(options)
    return {
        name.removeprefix("roco_"): value
        for name, value in extra_args.items()
        if name.startswith("roco_") and name != "roco_row"
    }
