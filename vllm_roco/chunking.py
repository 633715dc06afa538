# SPDX-License-Identifier: Apache-2.0
"""Where the steps end in which known tokens are read: the reading pace.

Eviction happens at the end of a step, so what a sequence keeps depends on where its
steps end from the first eviction on. These places depend on the sequence alone, never
on who else is scheduled. Before it, longer steps come to the same but for rounding.
"""

from __future__ import annotations

from vllm_roco.eviction_schedule import EvictionSchedule


def next_step_ends(
    num_computed_tokens: int,
    num_prompt_tokens: int,
    num_tokens: int,
    chunk: int,
    schedule: EvictionSchedule,
) -> tuple[int, int]:
    """Return the least and the greatest length at which the next step may end.

    A step of a prompt ends at the next multiple of `chunk` or at the prompt's end.
    While nothing is evicted it may also end later, up to the last such place before the
    first eviction; never sooner, so that no request lives on what others leave and
    keeps them waiting. From there on both lengths are one. Tokens that were generated
    before a preemption are read again in chunks that also end where `E` grows: the
    first run took them one by one and evicted exactly there.

    Args:
        num_computed_tokens: Tokens computed so far, fewer than `num_tokens`.
        num_prompt_tokens: Tokens of the prompt.
        num_tokens: All known tokens: the prompt and what was generated already.
        chunk: Tokens per step, at most once something is evicted.
        schedule: The eviction arithmetic.
    """
    end = min(num_tokens, (num_computed_tokens // chunk + 1) * chunk)
    if num_computed_tokens < num_prompt_tokens:
        end = min(end, num_prompt_tokens)
    else:
        end = min(end, schedule.next_eviction(num_computed_tokens))
    free = schedule.next_eviction(0) - 1
    if num_prompt_tokens > free:
        # the chunk that evicts first is a whole one
        free = free // chunk * chunk
    free = min(free, num_tokens)
    if num_computed_tokens < free:
        return min(end, free), free
    return end, end
