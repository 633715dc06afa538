# SPDX-License-Identifier: Apache-2.0
"""From the options of a request to its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_roco.config import RocoConfig
from vllm_roco.eviction_row import EvictionRow
from vllm_roco.eviction_schedule import NEVER
from vllm_roco.request_options.asked import Asked
from vllm_roco.request_options.budget import budget_blocks
from vllm_roco.request_options.choice import choice_of_blocks
from vllm_roco.request_options.forms import options_in
from vllm_roco.request_options.limits import check_chunk, check_protected, check_size
from vllm_roco.request_options.mode import mode_of
from vllm_roco.request_options.names import FULL
from vllm_roco.request_options.uses import check_uses


class RequestPlan(NamedTuple):
    """What holds for a request.

    Attributes:
        row: How it evicts.
        chunk: Prompt tokens that it reads per step once something is evicted.
    """

    row: EvictionRow
    chunk: int


@dataclass(frozen=True)
class RequestPlanner:
    """Turns options of requests into rows.

    Attributes:
        config: The server's options, which are the defaults and the limits.
        block_size: Tokens per KV block.
        chunk_limits: Most prompt tokens of one request in a step, by what sets the
            limit, in words for the operator.
    """

    config: RocoConfig
    block_size: int
    chunk_limits: Mapping[str, int] = field(default_factory=dict)

    def plan(
        self, extra_args: Mapping[str, Any] | None, num_prompt_tokens: int
    ) -> RequestPlan:
        """Return what holds for a request.

        Args:
            extra_args: `SamplingParams.extra_args`.
            num_prompt_tokens: `P`, the prompt's length.

        Raises:
            RequestOptionError: The request asks for what it cannot have.
        """
        asked = Asked(options_in(extra_args), self.config, self.block_size)
        mode = mode_of(asked)
        sink = asked.tokens("sink", 0)
        recent = asked.tokens("recent", 0)
        protected = asked.blocks(sink) + asked.blocks(recent)
        # nothing is ever compared with the budget of a request that keeps everything
        budget = asked.blocks(self.config.budget)
        if mode != FULL:
            budget = budget_blocks(asked, num_prompt_tokens, protected)
        stride = asked.tokens("stride", 1, min_of=budget) // self.block_size
        chunk = asked.tokens("chunk", 1, min_of=budget)
        check_chunk(asked, chunk, self.chunk_limits)
        resident, prompt = budget, asked.blocks(num_prompt_tokens)
        if mode == "generation":
            resident += prompt
        if mode == "generation" or (
            # a short question stays whole
            mode == "auto"
            and prompt <= budget // 2
            and max(asked.blocks(sink), prompt) + asked.blocks(recent) <= budget
        ):
            sink = max(sink, num_prompt_tokens)
        until = {FULL: 0, "prompt": num_prompt_tokens}.get(mode, NEVER)
        flags, shield_blocks = choice_of_blocks(asked, budget)
        seed = asked.seed()
        check_uses(asked, mode)
        row = EvictionRow(
            resident, stride, until, sink, recent, shield_blocks, flags, seed
        )
        if mode != FULL:
            # also where this prompt is too short for it to matter: a longer one is not
            check_protected(asked, row)
            check_size(asked, mode, row, num_prompt_tokens)
        if mode == "prompt" and not row.schedule(self.block_size).evicted_blocks(until):
            row = row._replace(until=0)
        return RequestPlan(row, chunk)
