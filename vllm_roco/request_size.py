# SPDX-License-Identifier: Apache-2.0
"""Whether there is as much memory as a request may come to hold.

One that could never have it would wait for ever. Front ends ask before they take a
request, and the scheduler once more.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_roco.eviction_schedule import NEVER
from vllm_roco.request_options.planner import RequestPlan
from vllm_roco.request_plans import ResolvedPlan


class RequestTooLargeError(ValueError):
    """A request may hold more than there is; the others are not concerned.

    Attributes:
        parameter: What of the request should be less, as vLLM calls it.
        value: What it is.
    """

    def __init__(self, parameter: str, value: int, message: str) -> None:
        super().__init__(f"roco: {message}")
        self.parameter = parameter
        self.value = value


@dataclass(frozen=True)
class RequestSizes:
    """Works out what requests may hold.

    Attributes:
        block_size: Tokens per KV block.
        max_steps_in_flight: Steps that may be scheduled but not yet processed.
        max_model_len: Most tokens of a request.
    """

    block_size: int
    max_steps_in_flight: int
    max_model_len: int

    def length(self, num_prompt_tokens: int, max_tokens: int) -> int:
        """Return the most tokens that there will be, those of the prompt included."""
        return min(num_prompt_tokens + max_tokens, self.max_model_len)

    def resolve(
        self,
        plan: RequestPlan,
        num_prompt_tokens: int,
        max_tokens: int,
        num_blocks: int | None,
    ) -> ResolvedPlan:
        """Return what a request's plan comes to.

        Args:
            plan: The plan.
            num_prompt_tokens: The prompt's length.
            max_tokens: Most tokens of the answer.
            num_blocks: The most blocks that a request can have, None if unknown.

        Raises:
            RequestTooLargeError: The request may come to hold more blocks.
        """
        resolved = ResolvedPlan.of(
            plan,
            self.block_size,
            self.max_steps_in_flight,
            self.length(num_prompt_tokens, max_tokens),
        )
        if num_blocks is not None and resolved.max_blocks > num_blocks:
            raise _too_large(resolved, num_prompt_tokens, max_tokens, num_blocks)
        return resolved


def _too_large(
    plan: ResolvedPlan, num_prompt_tokens: int, max_tokens: int, num_blocks: int
) -> RequestTooLargeError:
    schedule = plan.schedule
    longest = schedule.max_tokens_in(num_blocks, plan.max_in_flight_tokens)
    room = longest - num_prompt_tokens
    if room > 0:
        parameter, value = "max_tokens", max_tokens
        what = f"max_tokens = {max_tokens} after a prompt of {num_prompt_tokens} tokens"
        cure = f"a max_tokens of at most {room}"
    else:
        parameter, value = "input_tokens", num_prompt_tokens
        what = f"a prompt of {num_prompt_tokens} tokens with max_tokens = {max_tokens}"
        cure = f"a prompt and a max_tokens of together at most {longest}"
    cure += _other_cure(plan, num_blocks)
    return RequestTooLargeError(
        parameter,
        value,
        f"{what} may hold {plan.max_blocks} blocks of {schedule.block_size} tokens, "
        f"but the KV cache has {num_blocks}, so the request could never be served to "
        f"its end. Use {cure}.",
    )


def _other_cure(plan: ResolvedPlan, num_blocks: int) -> str:
    """Return what helps beside fewer tokens, with the words that lead to it."""
    schedule = plan.schedule
    smaller = "a smaller budget, stride or chunk"
    # what evictions leave, in whatever mode
    if schedule.max_blocks(plan.max_in_flight_tokens) <= num_blocks:
        return ', or mode "both"' if schedule.until != NEVER else ""
    if not schedule.until:
        return f', or mode "both" with {smaller}'
    if schedule.until != NEVER:
        return f', or {smaller}, if need be with mode "both"'
    return f", or {smaller}"
