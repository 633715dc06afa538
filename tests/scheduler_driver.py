# SPDX-License-Identifier: Apache-2.0
"""Drives vLLM's real scheduler, cache manager and block pool without an engine."""

from __future__ import annotations

import copy
import functools
import tempfile
import uuid
from collections import Counter, deque
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import KVEventsConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.configs import engine_config
from tests.kv_cache.specs import one_group
from tests.paged_worker import STOP_TOKEN, PagedWorker, Touched
from vllm_roco.config import UNBOUNDED_MODES, RocoConfig
from vllm_roco.eviction_row import ROW_KEY, EvictionRow
from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.kv_cache.integrity import check_integrity
from vllm_roco.kv_cache.manager import RocoManager
from vllm_roco.kv_cache.spec import RocoSpec
from vllm_roco.scheduler import (
    RocoAsyncScheduler,
    RocoScheduler,
    RocoSchedulerMixin,
)

BLOCK_SIZE = 4
MAX_NUM_SEQS = 4
MAX_MODEL_LEN = 1024

init_none_hash(sha256)


@functools.cache
def _base_config() -> VllmConfig:
    with tempfile.TemporaryDirectory() as folder:
        return engine_config(
            Path(folder),
            {},
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_SEQS + MAX_MODEL_LEN,
            enable_prefix_caching=True,
        )


@dataclass(frozen=True)
class Setup:
    """Small blocks, so that little work covers many evictions.

    Attributes:
        budget: Option of RoCo, in tokens; likewise stride and chunk.
        stride: See `budget`.
        chunk: See `budget`.
        max_num_batched_tokens: Tokens of a step; None for the least allowed.
        asynchronous: Whether decodes are scheduled before the last token is known.
        max_steps_in_flight: Steps that the driver keeps in flight.
        spare_blocks: Blocks of the pool above the bound of one sequence.
        trace: Option of RoCo.
        caching: Whether requests may begin behind prefixes that others have read.
        max_budget: Option of RoCo, at least `budget`; likewise allow_full.
        allow_full: See `max_budget`.
        windows: Tokens in the window of each further group of layers.
        mode: Option of RoCo; likewise prefill_tokens.
        prefill_tokens: See `mode`.
        prefix_hits: Option of RoCo; likewise turn_end_token_ids.
        turn_end_token_ids: See `prefix_hits`; likewise answer_start_token_ids.
        answer_start_token_ids: See `turn_end_token_ids`.
        hash_size: Tokens per hash, which divide a block: `--prefix-match-unit`.
        events: Whether vLLM tells of blocks that are stored and removed.
    """

    budget: int = 16
    stride: int = 8
    chunk: int = 8
    max_num_batched_tokens: int | None = None
    asynchronous: bool = False
    max_steps_in_flight: int = 1
    spare_blocks: int = 1000
    trace: str | None = None
    caching: bool = False
    max_budget: int | None = None
    allow_full: bool = False
    windows: tuple[int, ...] = ()
    mode: str = "both"
    prefill_tokens: int = RocoConfig().prefill_tokens
    prefix_hits: str = RocoConfig().prefix_hits
    turn_end_token_ids: tuple[int, ...] = ()
    answer_start_token_ids: tuple[int, ...] = ()
    hash_size: int = BLOCK_SIZE
    events: bool = False

    def roco_config(self) -> RocoConfig:
        """The options."""
        return RocoConfig(
            budget=self.budget,
            stride=self.stride,
            chunk=self.chunk,
            sink=BLOCK_SIZE,
            recent=BLOCK_SIZE,
            trace=self.trace,
            allow_full=self.allow_full,
            max_budget=self.max_budget or self.budget,
            mode=self.mode,
            prefill_tokens=self.prefill_tokens,
            prefix_hits=self.prefix_hits,
            turn_end_token_ids=self.turn_end_token_ids,
            answer_start_token_ids=self.answer_start_token_ids,
        )

    def spec(self) -> RocoSpec:
        """The spec of a layer."""
        return _spec_of(self)

    def plan(self, config: VllmConfig) -> KVCacheConfig:
        """The groups, RoCo's last, with room for one sequence and `spare_blocks`."""
        spec = self.spec()
        longer = ((self.max_budget or self.budget) - self.budget) // BLOCK_SIZE
        num_blocks = spec.max_blocks_per_sequence + longer + 1 + self.spare_blocks
        in_flight = self.max_steps_in_flight
        in_flight *= config.scheduler_config.max_num_batched_tokens
        groups = []
        for number, window in enumerate(self.windows):
            of_window = SlidingWindowSpec(
                block_size=BLOCK_SIZE,
                num_kv_heads=1,
                head_size=8,
                dtype=spec.dtype,
                sliding_window=window,
                page_size_padded=spec.page_size_bytes,
            )
            num_blocks += of_window.max_admission_blocks_per_request(
                in_flight, MAX_MODEL_LEN
            )
            groups.append(KVCacheGroupSpec([f"window {number}"], of_window))
        plan = one_group(spec, num_blocks)
        plan.kv_cache_groups[:0] = groups
        return plan

    def scheduler(self, **changes: Any) -> RocoSchedulerMixin:
        """A scheduler as the engine core builds it.

        Args:
            **changes: Attributes of `SchedulerConfig`.
        """
        config = copy.copy(_base_config())
        # numbers of schedulers that are left over are another instance's
        config.instance_id = uuid.uuid4().hex
        config.cache_config = copy.copy(config.cache_config)
        config.cache_config.block_size = BLOCK_SIZE
        config.cache_config.enable_prefix_caching = self.caching
        config.scheduler_config = copy.copy(config.scheduler_config)
        config.scheduler_config.async_scheduling = self.asynchronous
        config.scheduler_config.max_num_batched_tokens = (
            self.max_num_batched_tokens or MAX_NUM_SEQS + self.chunk
        )
        for name, value in changes.items():
            setattr(config.scheduler_config, name, value)
        plan = self.plan(config)
        config.cache_config.num_gpu_blocks = plan.num_blocks
        if self.events:
            config.kv_events_config = KVEventsConfig(
                enable_kv_cache_events=True, publisher="null"
            )
        options = self.roco_config()
        config.additional_config = {"roco": vars(options)}
        scheduler = RocoAsyncScheduler if self.asynchronous else RocoScheduler
        return scheduler(
            config,
            plan,
            StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=self.hash_size,
            log_stats=True,
        )


@functools.cache
def _spec_of(setup: Setup) -> RocoSpec:
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    return RocoSpec.from_attention_spec(
        full, setup.roco_config(), setup.max_steps_in_flight
    )


class Driver:
    """An engine core without an engine; `PagedWorker` executes.

    Attributes:
        scheduler: The scheduler under test.
        manager: Its block manager.
        windows: Those of further groups of layers.
        worker: Runs every scheduled step.
        outputs: Tokens of each request so far.
        num_steps: Calls of `schedule`.
        stats: What vLLM's counters have said of each processed step.
        num_snapshot_looks: Snapshots that `check` has compared with what they were.
    """

    def __init__(self, setup: Setup, **changes: Any) -> None:
        self.setup = setup
        self.scheduler = setup.scheduler(**changes)
        (manager,) = self.scheduler.roco_managers
        assert isinstance(manager, RocoManager)
        self.manager = manager
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.windows = [each for each in managers if each is not manager]
        self.worker = PagedWorker(
            manager.plans.default.schedule,
            setup.chunk,
            setup.windows,
            turn_end_token_ids=setup.turn_end_token_ids,
            answer_start_token_ids=setup.answer_start_token_ids,
            is_exact=setup.prefix_hits == "exact",
        )
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, EngineCoreOutput] = {}
        self.num_steps = 0
        self.stats: list[SchedulerStats] = []
        self.num_snapshot_looks = 0
        # what each snapshot's pages held when it was new
        self._frozen: dict[bytes, list[object]] = {}
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput, Touched]] = (
            deque()
        )
        self._preemptions: deque[dict[str, int]] = deque()

    def add(
        self,
        num_prompt_tokens: int,
        max_tokens: int = 1,
        *,
        request_id: str | None = None,
        prompt: Sequence[int] | None = None,
        ignore_stop: bool = True,
        resumable: bool = False,
        cache_salt: str | None = None,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> str:
        """Add a request and return its id.

        Args:
            num_prompt_tokens: Length of the prompt.
            max_tokens: Tokens to generate.
            request_id: Of a stream that goes on or ends; by default a new one.
            prompt: Its tokens; by default the same ones in every prompt.
            ignore_stop: Whether the stop token is an ordinary one.
            resumable: Whether more input may follow.
            cache_salt: As in vLLM.
            lora_request: Likewise.
            priority: Likewise; the policy must be told to heed it.
            **sampling: Further sampling parameters.
        """
        request_id = request_id or str(len(self.outputs))
        self.outputs.setdefault(request_id, [])
        params = SamplingParams(
            max_tokens=max_tokens,
            stop_token_ids=None if ignore_stop else [STOP_TOKEN],
            **sampling,
        )
        self.scheduler.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=list(prompt or [1] * num_prompt_tokens),
                sampling_params=params,
                pooling_params=None,
                block_hasher=get_request_block_hasher(self.setup.hash_size, sha256),
                resumable=resumable,
                cache_salt=cache_salt,
                lora_request=lora_request,
                priority=priority,
            )
        )
        return request_id

    @property
    def num_in_flight(self) -> int:
        """Steps that are scheduled but not processed."""
        return len(self._in_flight)

    def schedule(self, *, throttle_prefills: bool = False) -> dict[str, int]:
        """Schedule and execute a step.

        Args:
            throttle_prefills: As in vLLM, which holds prompts back in some steps.

        Returns:
            The tokens of each request in it.
        """
        self.num_steps += 1
        output = self.scheduler.schedule(throttle_prefills)
        result, touched = self.worker.execute(output)
        self._in_flight.append((output, result, touched))
        self._preemptions.append(
            {
                request_id: self.scheduler.requests[request_id].num_preemptions
                for request_id in output.num_scheduled_tokens
            }
        )
        self.check()
        return dict(output.num_scheduled_tokens)

    def complete(self) -> None:
        """Process the output of the oldest step in flight."""
        output, result, _ = self._in_flight.popleft()
        self._preemptions.popleft()
        for answers in self.scheduler.update_from_output(output, result).values():
            if answers.scheduler_stats is not None:
                self.stats.append(answers.scheduler_stats)
            for answer in answers.outputs:
                self.outputs[answer.request_id] += answer.new_token_ids
                if answer.finish_reason is not None:
                    self.finished[answer.request_id] = answer
        self.check()

    def step(self) -> dict[str, int]:
        """Schedule a step if there is work, and keep the pipeline as full as may be."""
        if self.num_in_flight == self.setup.max_steps_in_flight:
            self.complete()
        scheduled = self.schedule() if self.scheduler.has_requests() else {}
        is_full = self.num_in_flight == self.setup.max_steps_in_flight
        if self.num_in_flight and (is_full or not scheduled):
            self.complete()
        return scheduled

    def abort(self, request_id: str) -> None:
        """Abort a request in any state."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.check()

    def preempt_all(self) -> None:
        """Preempt every running request, as for an update of the weights."""
        self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.check()

    def drain(self, max_steps: int) -> None:
        """Run until nothing is left to do.

        Raises:
            AssertionError: That takes longer than `max_steps` steps.
        """
        last = self.num_steps + max_steps
        while self.scheduler.has_requests() or self.num_in_flight:
            assert self.num_steps < last, "a request starves"
            self.step()
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not self.manager.req_to_blocks
        assert not any(window.req_to_blocks for window in self.windows)
        assert self.manager.held.largest == 0

    def check(self) -> None:
        """Assert what must hold at any time."""
        manager = self.manager
        check_integrity(manager)
        held: set[int] = set()
        for request_id, row in manager.req_to_blocks.items():
            request = self.scheduler.requests[request_id]
            # of steps before a preemption nothing is in the row, though it may begin
            # again before they are processed
            in_flight = request.num_in_flight_tokens - request.num_stale_output_tokens
            processed = request.num_computed_tokens - in_flight
            schedule, bound = self.plan_of(request)
            nulls = [place for place, block in enumerate(row) if block.is_null]
            first, gap = schedule.budget_blocks, len(nulls)
            assert nulls == list(range(first, first + gap))
            assert gap <= schedule.evicted_blocks(max(0, processed))
            assert len(row) - gap <= bound
            held.update(block.block_id for block in row if not block.is_null)
        in_windows = Counter(
            block.block_id
            for window in self.windows
            for row in window.req_to_blocks.values()
            for block in row
            if not block.is_null
        )
        pool = self.scheduler.kv_cache_manager.block_pool
        assert not held & in_windows.keys()
        held |= in_windows.keys()
        assert pool.get_num_free_blocks() + len(held) == pool.num_gpu_blocks - 1
        for block_id, num_rows in in_windows.items():
            assert pool.blocks[block_id].ref_cnt == num_rows
        self._check_snapshots(held)
        self._check_in_flight()
        self._check_counts()

    def _check_snapshots(self, held: Set[int]) -> None:
        """Assert that each block is of one snapshot at most, and that none changes."""
        cache = self.scheduler.prefix_cache
        if cache is None:
            return
        owners: dict[int, bytes] = {}
        frozen = {}
        for snapshot in cache.store._snapshots.values():
            if not snapshot.is_whole:
                continue
            self.num_snapshot_looks += 1
            name = bytes(snapshot.name)
            copies = [block.block_id for block in snapshot.blocks]
            for block_id in copies:
                assert owners.setdefault(block_id, name) == name, "of two snapshots"
                assert block_id not in held, "a snapshot's block is a request's"
            pages: list[object] = [self.worker.page(block_id) for block_id in copies]
            for in_window in snapshot.windows:
                pages += [
                    self.worker.window_page(block.block_id)
                    for block in in_window
                    if not block.is_null
                ]
            frozen[name] = self._frozen.get(name, pages)
            assert frozen[name] == pages, "a snapshot was written over"
        self._frozen = frozen

    def plan_of(self, request: Request) -> tuple[EvictionSchedule, int]:
        """Return how a request evicts and the most blocks that it may ever hold."""
        assert request.sampling_params is not None
        options = request.sampling_params.extra_args or {}
        schedule = self.setup.spec().schedule
        if self.setup.mode in UNBOUNDED_MODES:
            # who evicts in such a mode has a row
            schedule = replace(schedule, until=0)
        if ROW_KEY in options:
            schedule = EvictionRow(*options[ROW_KEY]).schedule(BLOCK_SIZE)
        chunk = options.get("roco_chunk", self.setup.chunk)
        in_flight = self.setup.max_steps_in_flight * -(-chunk // BLOCK_SIZE)
        peak = schedule.budget_blocks + schedule.stride_blocks + in_flight + 1
        most = request.num_prompt_tokens + request.max_tokens
        final = -(-most // BLOCK_SIZE) - schedule.evicted_blocks(most)
        return schedule, max(peak, final) if schedule.until else final

    def _check_in_flight(self) -> None:
        for (_, _, touched), preemptions in zip(
            self._in_flight, self._preemptions, strict=True
        ):
            for request_id, blocks in touched.rows.items():
                request = self.scheduler.requests.get(request_id)
                if (
                    request is None
                    or request.num_preemptions != preemptions[request_id]
                ):
                    # vLLM takes the blocks at once: later steps run later
                    continue
                row = self.manager.req_to_blocks[request_id]
                for place, block_id in blocks.items():
                    assert row[place].block_id == block_id, "freed while in flight"
                of_windows = touched.windows[request_id]
                for window, blocks in zip(self.windows, of_windows, strict=True):
                    row = window.req_to_blocks[request_id]
                    for place, block_id in blocks.items():
                        assert row[place].block_id == block_id, "freed in a window"

    def _check_counts(self) -> None:
        """Assert that balancers of several engines are told of each request once."""
        scheduler = self.scheduler
        assert sum(scheduler.get_request_counts()) == len(scheduler.requests)
        assert scheduler.deferred_waiting <= {*scheduler.waiting}
