# SPDX-License-Identifier: Apache-2.0
"""A worker without a model: it runs a scheduler's steps over pages that carry labels.

Every page says whose block it holds. A step that would read another sequence's block,
write over one, or evict differently from the same request alone in an endless pool,
fails. Which blocks go is arbitrary but a function of the sequence alone, as it is with
attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from tests.lone_run import LoneRun, choose, hash_of
from vllm_roco.eviction_row import ROW_KEY, EvictionRow
from vllm_roco.eviction_schedule import NEVER, EvictionSchedule
from vllm_roco.policy import plan_moves

STOP_TOKEN = 0
_NUM_TOKENS = 64
_SHARED = ("several requests", 0)
"""The owner of a page from when on others than its writer hold it as well."""


class Page(NamedTuple):
    """What a page holds.

    Attributes:
        owner: The request and how often it had been preempted.
        logical: Index of the block in the sequence.
        num_tokens: Tokens written so far.
        prefix: Stands for all tokens of the sequence up to the last one written.
        length: Of the sequence when it was last attended to: its statistics' age.
        is_measured: Whether every query since it was begun is in its statistics.
        is_mixed: Whether those of other sequences are, too.
    """

    owner: tuple[str, int]
    logical: int
    num_tokens: int
    prefix: int
    length: int
    is_measured: bool
    is_mixed: bool = False


@dataclass(frozen=True)
class WindowPage:
    """What a page of layers with a window holds.

    Attributes:
        owner: The request that wrote it and how often it had been preempted.
        num_tokens: Tokens written so far.
        content: Stands for all of which the last one's keys and values depend.
    """

    owner: tuple[str, int]
    num_tokens: int
    content: object


@dataclass
class Sequence:
    """A sequence as the worker knows it.

    Attributes:
        num_prompt_tokens: Length of the prompt.
        ends: Where its chunks end, once it evicts.
        answers: Where earlier answers in it begin and end.
        prefixes: What stands for the first tokens, by their number less one, of the
            prompt and all that was sampled.
        num_known_tokens: Prompt and sampled tokens.
        row: Block ids by logical block; entries of freed blocks are stale.
        num_runs: How often it was started, less one.
        schedule: Its eviction arithmetic.
        chunk: Most prompt tokens in a step, once it evicts.
        alone: What it keeps without any company.
        is_alike: Whether it must keep that: not behind a hit that is not exact.
        window_rows: Likewise block ids, of each group of layers with a window.
        contents: What stands for keys and values of its tokens in these layers.
    """

    num_prompt_tokens: int
    ends: list[int]
    answers: list[tuple[int, int]]
    prefixes: list[int]
    num_known_tokens: int
    row: list[int]
    schedule: EvictionSchedule
    chunk: int
    alone: LoneRun
    window_rows: list[list[int]]
    contents: list[object] = field(default_factory=list)
    is_alike: bool = True
    num_runs: int = 0

    def append(self, token: int) -> None:
        """Take another token."""
        before = self.prefixes[-1] if self.prefixes else 0
        self.prefixes.append(hash_of(before, token))

    def content(self, position: int, start: int) -> object:
        """Return what stands for keys and values behind layers that evict.

        Args:
            position: Of the token.
            start: Where the step begins that computes it.
        """
        if not self.schedule.evicted_blocks(start):
            return self.prefixes[position]
        # what is evicted later does not matter
        schedule = replace(self.schedule, until=NEVER)
        return self.prefixes[position], schedule, self.chunk


class PagedWorker:
    """Executes steps in the order in which they were scheduled.

    Args:
        schedule: The eviction arithmetic of a sequence without options.
        chunk: Likewise, most prompt tokens in a step.
        windows: Tokens in the window of each further group, whose blocks come first.
        turn_end_token_ids: Tokens behind which a chunk may end.
        answer_start_token_ids: Tokens behind which an answer begins.
        is_exact: Whether who evicts while it is read keeps what it would keep alone.
    """

    def __init__(
        self,
        schedule: EvictionSchedule,
        chunk: int,
        windows: tuple[int, ...] = (),
        *,
        turn_end_token_ids: tuple[int, ...] = (),
        answer_start_token_ids: tuple[int, ...] = (),
        is_exact: bool = True,
    ) -> None:
        self._schedule = schedule
        self._chunk = chunk
        self._turn_end_token_ids = turn_end_token_ids
        self._answer_start_token_ids = [*answer_start_token_ids]
        self._windows = windows
        self._is_exact = is_exact
        self._pages: dict[int, Page] = {}
        self._window_pages: dict[int, WindowPage] = {}
        self._sequences: dict[str, Sequence] = {}
        # blocks that the step being run has copied to, or computed
        self._copied: set[int] = set()
        self._computed: set[int] = set()
        self.num_evictions = 0
        self.num_hits = 0
        self.num_answers_hit = 0
        self.num_shared = 0
        self.num_copies = 0

    def page(self, block_id: int) -> Page:
        """Return what a page of the layers that evict holds."""
        return self._pages[block_id]

    def window_page(self, block_id: int) -> WindowPage:
        """Return what a page of the layers with a window holds."""
        return self._window_pages[block_id]

    def execute(self, output: SchedulerOutput) -> tuple[ModelRunnerOutput, Touched]:
        """Run a step and return its sampled tokens and the blocks that it touched."""
        for request_id in output.finished_req_ids:
            self._sequences.pop(request_id, None)
        self._take_rows(output)
        self._copy_pages(output)
        sampled = []
        touched = Touched()
        for request_id, num_queries in output.num_scheduled_tokens.items():
            start = self._starts[request_id]
            touched.rows[request_id] = self._run(request_id, start, start + num_queries)
            touched.windows[request_id] = self._run_windows(
                request_id, start, start + num_queries
            )
            sampled.append(self._sample(request_id, start + num_queries))
        request_ids = list(output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={name: index for index, name in enumerate(request_ids)},
            sampled_token_ids=sampled,
        )
        return result, touched

    def _plan(self, params: SamplingParams | None) -> tuple[EvictionSchedule, int]:
        """Return how a sequence evicts, from what reaches a worker with it."""
        options = (params and params.extra_args) or {}
        schedule, chunk = self._schedule, options.get("roco_chunk", self._chunk)
        if ROW_KEY in options:
            schedule = EvictionRow(*options[ROW_KEY]).schedule(schedule.block_size)
        return schedule, chunk

    def _ends(
        self, prompt: list[int], chunk: int, answers: list[tuple[int, int]]
    ) -> list[int]:
        """Return where the chunks of a prompt end, found block by block."""
        size = self._schedule.block_size
        least = max(size, self._chunk // 4)
        ends, last = [], 0
        for end in range(size, len(prompt) + 1, size):
            # the turn may end before the next block is full
            is_turn = any(
                prompt[place - 1] in self._turn_end_token_ids
                # what was asked before an answer was read without what came later
                and not any(end < start < place for start, _ in answers)
                for place in range(end, min(end + size, len(prompt) + 1))
            )
            is_turn &= chunk > least and end - last >= least
            if end - last == chunk or is_turn:
                ends.append(end)
                last = end
        return ends

    def _answers(self, prompt: list[int]) -> list[tuple[int, int]]:
        """Return where answers begin and end in a prompt, found token by token."""
        start = self._answer_start_token_ids
        can_be_told = bool(start and self._turn_end_token_ids)
        if self._windows or not self._is_exact or not can_be_told:
            return []
        answers = []
        begun = None
        for end in range(1, len(prompt) + 1):
            if begun is not None and prompt[end - 1] in self._turn_end_token_ids:
                answers.append((begun, end))
                begun = None
            # the token that ends one may be the last before another
            if begun is None and prompt[max(0, end - len(start)) : end] == start:
                begun = end
        return answers if begun is None else [*answers, (begun, NEVER)]

    def _take_rows(self, output: SchedulerOutput) -> None:
        self._starts: dict[str, int] = {}
        self._new: set[str] = set()
        for new in output.scheduled_new_reqs:
            assert new.prompt_token_ids is not None
            *window_rows, blocks = map(list, new.block_ids)
            length = len(new.prompt_token_ids)
            schedule, chunk = self._plan(new.sampling_params)
            answers = self._answers(new.prompt_token_ids)
            ends = self._ends(new.prompt_token_ids, chunk, answers)
            sequence = self._sequences[new.req_id] = Sequence(
                num_prompt_tokens=length,
                ends=ends,
                answers=answers,
                prefixes=[],
                num_known_tokens=length,
                row=blocks,
                window_rows=window_rows,
                schedule=schedule,
                chunk=chunk,
                alone=LoneRun(length, ends, answers, schedule),
            )
            for token in new.prompt_token_ids:
                sequence.append(token)
            self._starts[new.req_id] = new.num_computed_tokens
            self._new.add(new.req_id)
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            sequence = self._sequences[request_id]
            new_blocks = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                sequence.row = []
                sequence.window_rows = [[] for _ in self._windows]
                sequence.num_runs += 1
                self._new.add(request_id)
                sequence.num_known_tokens = (
                    sequence.num_prompt_tokens + cached.num_output_tokens[index]
                )
            *of_windows, of_row = new_blocks or [[] for _ in (*self._windows, 0)]
            sequence.row += of_row
            for row, blocks in zip(sequence.window_rows, of_windows, strict=True):
                row += blocks
            self._starts[request_id] = cached.num_computed_tokens[index]

    def _copy_pages(self, output: SchedulerOutput) -> None:
        """Copy before anything is computed: one gather, one scatter."""
        copies = output.kv_cache_block_copies or ()
        sources = [copy.src_block_id for copy in copies]
        targets = [copy.dst_block_id for copy in copies]
        assert len(set(targets)) == len(targets), "two copies into one block"
        # a worker copies a few at a time, layer by layer
        assert not {*targets} & {*sources}, "a copy of a copy"
        assert not set(sources) & set(targets), "a copy of what is being copied"
        pages = [self._pages[block] for block in sources]
        self._pages.update(zip(targets, pages, strict=True))
        for block in targets:
            self._window_pages.pop(block, None)
        self._copied = set(targets)
        self.num_copies += len(targets)
        self._computed = set()

    def _adopt(self, sequence: Sequence, owner: tuple[str, int], start: int) -> None:
        """Take over what a request begins with, which must be of this very prefix."""
        size = self._schedule.block_size
        # who has read all it knows before it evicts begins with any blocks
        schedule = sequence.schedule
        by_block = sequence.num_known_tokens < schedule.next_eviction(0)
        by_block &= not self._windows
        if not by_block and self._is_exact:
            assert start <= sequence.num_prompt_tokens, "a hit in generated tokens"
            is_answer = any(first <= start <= last for first, last in sequence.answers)
            assert start in sequence.ends or is_answer, "a hit within a chunk"
            self.num_answers_hit += start not in sequence.ends
        logical: set[int] = set()
        places = self._places(schedule, start, start)
        for place in places:
            block = sequence.row[place]
            page = self._pages[block]
            assert block not in self._computed, "a block of this step"
            last = min((page.logical + 1) * size, start)
            assert page.num_tokens == last - page.logical * size
            assert page.is_measured or not schedule.until, "no statistics"
            assert page.prefix == sequence.prefixes[last - 1], (
                "a block of another prefix"
            )
            assert by_block or not self._is_exact or page.length == start, (
                "statistics of another length"
            )
            assert by_block or not self._is_exact or not page.is_mixed, (
                "statistics of other sequences, too"
            )
            assert by_block or block in self._copied, "the copy was not made"
            # whoever wrote a shared block must never evict: see `_run`
            is_copy = block in self._copied
            self._pages[block] = page._replace(
                owner=owner if is_copy else _SHARED,
                is_mixed=page.is_mixed or page.length != start or not is_copy,
            )
            self.num_shared += not is_copy
            logical.add(page.logical)
        assert len(logical) == len(places), "a block is in two places"
        logical.discard(start // size)
        if by_block or not schedule.evicted_blocks(start):
            assert logical == set(range(start // size)), "a hit with a hole"
        elif not self._is_exact:
            sequence.is_alike = False
        else:
            assert logical == sequence.alone.after(start), "a hit keeps other blocks"
        self.num_hits += 1

    @staticmethod
    def _places(schedule: EvictionSchedule, start: int, end: int) -> list[int]:
        """Return where a row has live blocks in a step."""
        resident = schedule.budget_blocks
        num_blocks = -(-end // schedule.block_size)
        return [
            *range(min(resident, num_blocks)),
            *range(resident + schedule.evicted_blocks(start), num_blocks),
        ]

    def _run(self, request_id: str, start: int, end: int) -> dict[int, int]:
        sequence = self._sequences[request_id]
        owner = (request_id, sequence.num_runs)
        size = self._schedule.block_size
        if start and request_id in self._new:
            self._adopt(sequence, owner, start)
        schedule = sequence.schedule
        is_measured = start < schedule.until
        before = schedule.evicted_blocks(start)
        after = schedule.evicted_blocks(end)
        for position in range(start, end):
            block, logical = sequence.row[position // size], position // size
            is_mixed = False
            if position % size:
                page = self._pages[block]
                written = (page.owner, page.logical, page.num_tokens)
                expected = (owner, logical, position % size)
                assert written == expected, "a block was written over"
                is_mixed = page.is_mixed
            prefix = sequence.prefixes[position]
            self._computed.add(block)
            self._window_pages.pop(block, None)
            self._pages[block] = Page(
                owner,
                logical,
                position % size + 1,
                prefix,
                end,
                is_measured,
                is_mixed,
            )

        places = self._places(schedule, start, end)
        live = [sequence.row[place] for place in places]
        assert len(set(live)) == len(live), "a block is in two places"
        attended = 0
        for block in live:
            page = self._pages[block]
            assert page.owner == owner or (page.owner == _SHARED and not after), (
                "a block of another sequence is read"
            )
            assert page.num_tokens == min(size, end - page.logical * size)
            self._pages[block] = page._replace(length=end)
            attended += page.num_tokens
        assert attended == schedule.live_tokens(end, start)
        if end <= schedule.until:
            assert attended - (end - start) <= schedule.max_live_tokens()
        if after > before:
            self._evict(sequence, live, after - before, end)
        return dict(zip(places, live, strict=True))

    def _run_windows(
        self, request_id: str, start: int, end: int
    ) -> list[dict[int, int]]:
        """Write and read in the groups with a window; return the blocks by place."""
        sequence = self._sequences[request_id]
        owner, size = (request_id, sequence.num_runs), self._schedule.block_size
        if request_id in self._new:
            # as if it had read that in chunks
            begun = [
                max((end for end in sequence.ends if end <= position), default=0)
                for position in range(start)
            ]
            sequence.contents = [*map(sequence.content, range(start), begun)]
        sequence.contents += [sequence.content(p, start) for p in range(start, end)]
        touched = []
        for window, row in zip(self._windows, sequence.window_rows, strict=True):
            for position in range(start, end):
                block = row[position // size]
                assert block, "a token is written into the null block"
                if position % size:
                    before = sequence.contents[position - 1]
                    expected = WindowPage(owner, position % size, before)
                    assert self._window_pages[block] == expected, (
                        "a block of a window was written over"
                    )
                content = sequence.contents[position]
                page = WindowPage(owner, position % size + 1, content)
                self._window_pages[block] = page
                self._pages.pop(block, None)
            places = range(max(0, start - window + 1) // size, -(-end // size))
            for place in places:
                page = self._window_pages[row[place]]
                last = min((place + 1) * size, end) - 1
                assert page.num_tokens == last % size + 1
                assert page.content == sequence.contents[last], (
                    "a window has keys and values of others"
                )
                if page.owner != owner:
                    self.num_shared += 1
            touched.append({place: row[place] for place in places})
        return touched

    def _evict(
        self, sequence: Sequence, live: list[int], num_victims: int, end: int
    ) -> None:
        resident = sequence.schedule.budget_blocks
        assert all(self._pages[block].is_measured for block in live), "no statistics"
        labels = [self._pages[block].logical for block in live]
        chosen = choose(labels[: resident + num_victims], num_victims, end)
        victims = sorted(labels.index(label) for label in chosen)
        for source, destination in plan_moves(torch.tensor(victims), resident):
            self._pages[live[destination]] = self._pages[live[source]]
        kept = [
            self._pages[block]
            for block in live[:resident] + live[resident + num_victims :]
        ]
        full = {
            page.logical
            for page in kept
            if page.num_tokens == self._schedule.block_size
        }
        assert not sequence.is_alike or full == sequence.alone.after(end), (
            "company changed what is kept"
        )
        self.num_evictions += 1

    def _sample(self, request_id: str, end: int) -> list[int]:
        sequence = self._sequences[request_id]
        if end < sequence.num_known_tokens:
            return []
        sequence.num_known_tokens = end + 1
        token = hash_of(request_id, end) % _NUM_TOKENS
        if len(sequence.prefixes) == end:
            sequence.append(token)
        return [token]


@dataclass
class Touched:
    """Blocks that a step reads or writes, by request and place in the row.

    Attributes:
        rows: Of the layers that evict.
        windows: Of each group of layers with a window.
    """

    rows: dict[str, dict[int, int]] = field(default_factory=dict)
    windows: dict[str, list[dict[int, int]]] = field(default_factory=dict)
