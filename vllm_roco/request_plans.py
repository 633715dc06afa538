# SPDX-License-Identifier: Apache-2.0
"""What holds for each request, worked out once for everything on the scheduler's side.

Scheduler, block managers and prefix cache read one book, which the scheduler writes: a
plan is entered before a request is taken, survives preemption, and is dropped when the
request is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from vllm_roco.chunking import ChunkEnds
from vllm_roco.config import RocoConfig, blocks_of
from vllm_roco.eviction_row import NUM_ROW_FIELDS
from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.request_options.planner import RequestPlan

# the fields of a row but one, and the chunk
_KEY = struct.Struct(f"<{NUM_ROW_FIELDS}i")


class LaterTurn(NamedTuple):
    """What is likely to follow in a conversation, see `Answers.later_prompt`.

    Attributes:
        num_prompt_tokens: Length of the prompt.
        plan: What would hold for it.
    """

    num_prompt_tokens: int
    plan: RequestPlan


@dataclass(frozen=True, slots=True)
class ResolvedPlan:
    """How one request evicts, in the words of the scheduler's side.

    Attributes:
        schedule: The eviction arithmetic.
        chunk: Prompt tokens per step, at most once something is evicted.
        max_in_flight_tokens: Most tokens that are scheduled but not yet processed once
            something is evicted, the step being scheduled included.
        max_blocks: The most blocks ever held.
        snapshot_key: Stands for all of which depends what is kept once something is
            evicted, the tokens apart.
        ends: Where the chunks of the prompt end.
        keeps_for_next_turn: Whether the next turn of a conversation may keep the same
            blocks, and is likely to come: it has gone on once, or may be read for that.
        evicts_in_later_turn: Whether the turn that `Answers.later_prompt` tells of is
            likely to evict while it is read, and this one does not.
        first_eviction: The least length at which something is evicted, or `NEVER`.
    """

    schedule: EvictionSchedule
    chunk: int
    max_in_flight_tokens: int
    max_blocks: int
    snapshot_key: bytes
    ends: ChunkEnds
    keeps_for_next_turn: bool = False
    evicts_in_later_turn: bool = False
    first_eviction: int = field(init=False)

    def __post_init__(self) -> None:
        # asked for in each step, and the class is frozen for everybody else
        object.__setattr__(self, "first_eviction", self.schedule.next_eviction(0))

    @classmethod
    def of(
        cls, plan: RequestPlan, block_size: int, max_steps_in_flight: int, length: int
    ) -> ResolvedPlan:
        """Return what a plan comes to.

        Args:
            plan: Of a request, or the server's default.
            block_size: Tokens per block.
            max_steps_in_flight: Steps that may be scheduled but not yet processed.
            length: The most tokens that there will be.
        """
        schedule = plan.row.schedule(block_size)
        in_flight = max_steps_in_flight * plan.chunk
        return cls(
            schedule,
            plan.chunk,
            in_flight,
            schedule.max_blocks(in_flight, length),
            _snapshot_key(plan),
            ChunkEnds(plan.chunk),
        )

    def read_in(
        self,
        ends: ChunkEnds,
        num_prompt_tokens: int,
        later_turn: LaterTurn | None = None,
    ) -> ResolvedPlan:
        """Return the plan of a request whose prompt's chunks end at these lengths.

        Args:
            ends: Of the prompt.
            num_prompt_tokens: Its length.
            later_turn: What is likely to follow if it is a conversation's.
        """
        if later_turn is None or _snapshot_key(later_turn.plan) != self.snapshot_key:
            return replace(self, ends=ends)
        most = later_turn.num_prompt_tokens
        evicts = num_prompt_tokens < self.first_eviction <= most
        return replace(
            self,
            ends=ends,
            keeps_for_next_turn=evicts or not ends.answers.is_first_turn,
            evicts_in_later_turn=evicts,
        )

    @property
    def is_read_for_later_turns(self) -> bool:
        """Whether it is a first turn that later ones can make use of, see `LaterTurns`.

        If it is read for these it leaves its end, and no snapshot of its prompt.
        """
        return self.evicts_in_later_turn and self.ends.answers.is_first_turn

    @property
    def is_measured(self) -> bool:
        """Whether blocks have statistics, without which nobody can evict."""
        return self.schedule.until > 0

    def max_blocks_at(self, num_tokens: int) -> int:
        """Return the most blocks held until so many tokens are known."""
        return min(
            self.max_blocks,
            self.schedule.max_blocks(self.max_in_flight_tokens, num_tokens),
        )


def _snapshot_key(plan: RequestPlan) -> bytes:
    fields = plan.row._asdict()
    # a place of a snapshot lies in the prompt, where all that evict go on evicting, and
    # ends of answers are kept where they do, and for prompts that evict
    del fields["until"]
    return _KEY.pack(*fields.values(), plan.chunk)


def most_blocks_by_default(
    config: RocoConfig, block_size: int, max_steps_in_flight: int, max_model_len: int
) -> int:
    """Return the most blocks that a request without options ever holds.

    Args:
        config: The server's options.
        block_size: Tokens per block.
        max_steps_in_flight: Steps that may be scheduled but not yet processed.
        max_model_len: Most tokens of a request.
    """
    if config.most_kept is None:
        return blocks_of(max_model_len, block_size)
    schedule = EvictionSchedule(block_size, config.most_kept, config.stride)
    return schedule.max_blocks(max_steps_in_flight * config.chunk, max_model_len)


class RequestPlans:
    """The plans of requests that are not done; who has none goes by the default.

    Args:
        default: Of a request without options.
    """

    def __init__(self, default: ResolvedPlan) -> None:
        self.default = default
        self._own: dict[str, ResolvedPlan] = {}

    def enter(self, request_id: str, plan: ResolvedPlan) -> None:
        """Note a plan."""
        self._own[request_id] = plan

    def of(self, request_id: str) -> ResolvedPlan:
        """Return what holds for a request."""
        return self._own.get(request_id, self.default)

    def drop(self, request_id: str) -> None:
        """Forget a request."""
        self._own.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._own)
