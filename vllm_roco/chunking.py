# SPDX-License-Identifier: Apache-2.0
"""Where the chunks end in which known tokens are read: the reading pace.

Eviction happens at the end of a step, so what a sequence keeps depends on where its
steps end. These places depend on the sequence alone, never on who else is scheduled.
"""

from __future__ import annotations

from vllm_roco.eviction_schedule import EvictionSchedule


def next_chunk_end(
    num_computed_tokens: int,
    num_prompt_tokens: int,
    num_tokens: int,
    chunk: int,
    schedule: EvictionSchedule,
) -> int:
    """Return the length at which the next step of a prefill must end.

    Prompt chunks end at multiples of `chunk` and at the prompt's end. Tokens that were
    generated before a preemption are read again in chunks that also end where `E`
    grows: the first run took them one by one and evicted exactly there.

    Args:
        num_computed_tokens: Tokens computed so far, fewer than `num_tokens`.
        num_prompt_tokens: Tokens of the prompt.
        num_tokens: All known tokens: the prompt and what was generated already.
        chunk: Most tokens per step.
        schedule: The eviction arithmetic.
    """
    end = min(num_tokens, (num_computed_tokens // chunk + 1) * chunk)
    if num_computed_tokens < num_prompt_tokens:
        return min(end, num_prompt_tokens)
    return min(end, schedule.next_eviction(num_computed_tokens))
