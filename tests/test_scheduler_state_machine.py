# SPDX-License-Identifier: Apache-2.0
"""Anything that requests may do, in any order, over vLLM's real scheduler.

`Driver.check` holds after every rule: no sequence above its bound, no block with two
owners or lost, none freed under a step in flight. `PagedWorker` holds in every step:
nobody reads or overwrites another's block, and each request evicts as it does alone.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.interface import PauseState

from tests.conftest import NIGHTLY_EXAMPLES
from tests.scheduler_driver import BLOCK_SIZE, MAX_NUM_SEQS, Driver, Setup

MAX_PROMPT = 150
MAX_OUTPUT = 60

# prompts begin with a part of one of them; the second parts from the first midway
STEMS = (
    [2 + place % 50 for place in range(MAX_PROMPT)],
    [2 + place % 50 if place < 70 else 60 for place in range(MAX_PROMPT)],
    [1] * MAX_PROMPT,
)

CUE = (52, 53)
"""What a template puts before an answer."""

ADAPTERS = [LoRARequest(f"adapter {n}", n, f"/nowhere/{n}") for n in (1, 2)]

EXAMPLES = 36
"""Of each machine, with some 20 steps each; a nightly run has more."""

LEAST_STEPS = 670
"""Of each machine, 10,050 over all; each is of several scheduled ones."""

LEAST_NIGHTLY_STEPS = 7_700
"""115,500 over all machines."""

# in blocks; None leaves an option to the server
OPTIONS = st.none() | st.fixed_dictionaries(
    {"roco_chunk": st.integers(1, 6)},
    optional={
        "roco_budget": st.integers(2, 12) | st.sampled_from([0.25, 0.6]),
        "roco_stride": st.integers(1, 4),
        "roco_mode": st.sampled_from(["both", "prompt", "generation", "auto", "full"]),
    },
)


class SchedulerMachine(RuleBasedStateMachine):
    """Synchronous scheduling, one step at a time."""

    asynchronous = False
    max_steps_in_flight = 1
    caching = False
    has_options = False
    prefix_hits = "exact"
    windows: tuple[int, ...] = ()
    done: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.driver: Driver | None = None
        self.lengths: dict[str, tuple[int, int]] = {}
        self.aborted: set[str] = set()
        self.chunks: dict[str, int] = {}
        self.refused: set[str] = set()
        # prompts of conversations, and how the last request of each asked
        self.asked: dict[str, tuple[list[int], dict[str, Any] | None]] = {}

    @initialize(
        # in blocks: each larger than, equal to or smaller than the others
        shape=st.sampled_from(
            [(4, 2, 2), (4, 1, 6), (2, 4, 2), (1, 1, 1), (5, 3, 4), (24, 8, 4)]
        ),
        spare_tokens=st.integers(0, 40),
        # none at all, too few for two sequences, enough for every sequence
        spare_blocks=st.sampled_from([0, 1, 3, 8, 12, 100]),
        # one prompt after another, a few, or as many as a step has room for
        prefill_tokens=st.sampled_from([1, 2 * BLOCK_SIZE, MAX_PROMPT]),
        # none, some of the stems', or every token of one stem
        turn_end_token_ids=st.sampled_from([(), (7, 20, 41), (1,)]),
        # none, or what a next turn puts before its answer
        answer_start_token_ids=st.sampled_from([(), CUE, CUE]),
        # of two, in the place of one
        has_adapters=st.sampled_from([False, False, True]),
    )
    def start(
        self,
        shape: tuple[int, int, int],
        spare_tokens: int,
        spare_blocks: int,
        prefill_tokens: int,
        turn_end_token_ids: tuple[int, ...],
        answer_start_token_ids: tuple[int, ...],
        has_adapters: bool,
    ) -> None:
        budget, stride, chunk = (blocks * BLOCK_SIZE for blocks in shape)
        self.driver = Driver(
            Setup(
                # the first and the newest block are protected
                budget=max(budget, 2 * BLOCK_SIZE),
                stride=stride,
                chunk=chunk,
                max_num_batched_tokens=MAX_NUM_SEQS + chunk + spare_tokens,
                asynchronous=self.asynchronous,
                max_steps_in_flight=self.max_steps_in_flight,
                spare_blocks=spare_blocks,
                prefill_tokens=prefill_tokens,
                caching=self.caching,
                prefix_hits=self.prefix_hits,
                turn_end_token_ids=turn_end_token_ids,
                answer_start_token_ids=answer_start_token_ids,
                windows=self.windows,
                allow_full=self.has_options,
                max_budget=(MAX_PROMPT + 2) + 12 * BLOCK_SIZE
                if self.has_options
                else None,
            )
        )
        if has_adapters:
            self.driver.scheduler.lora_config = LoRAConfig(max_loras=1)

    @invariant()
    def count(self) -> None:
        self.done["steps"] += self.driver is not None

    @rule(
        stem=st.sampled_from(STEMS),
        num_stem_tokens=st.integers(0, MAX_PROMPT),
        num_prompt_tokens=st.integers(1, MAX_PROMPT),
        max_tokens=st.integers(1, MAX_OUTPUT),
        ignore_stop=st.booleans(),
        how_often=st.sampled_from([1, 1, 1, 2, 3]),
        options=OPTIONS,
        adapter=st.sampled_from([None, *ADAPTERS]),
    )
    def add(
        self,
        stem: list[int],
        num_stem_tokens: int,
        num_prompt_tokens: int,
        max_tokens: int,
        ignore_stop: bool,
        how_often: int,
        options: dict[str, Any] | None,
        adapter: LoRARequest | None,
    ) -> None:
        assert self.driver is not None
        if self.driver.scheduler.lora_config is None:
            adapter = None
        extra_args = self.arguments(options) if self.has_options and options else None
        before = copy.deepcopy(extra_args)
        for _ in range(how_often):
            shared = stem[: min(num_stem_tokens, num_prompt_tokens)]
            own = [62 + len(self.lengths) % 60] * (num_prompt_tokens - len(shared))
            self.ask(
                shared + own,
                max_tokens,
                extra_args,
                ignore_stop=ignore_stop,
                lora_request=adapter,
            )
            assert extra_args == before, "shared by several requests"

    def arguments(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return what a request asks with, in tokens."""
        assert self.driver is not None
        found = {
            name: value * BLOCK_SIZE if isinstance(value, int) else value
            for name, value in options.items()
        }
        room = self.driver.scheduler.max_num_scheduled_tokens - MAX_NUM_SEQS
        found["roco_chunk"] = min(found["roco_chunk"], room // BLOCK_SIZE * BLOCK_SIZE)
        if found.get("roco_mode") == "full":
            found.pop("roco_stride", None)
        else:
            # a stride of the server's would not fit above every budget
            found.setdefault("roco_stride", BLOCK_SIZE)
        return found

    def ask(
        self,
        prompt: list[int],
        max_tokens: int,
        extra_args: dict[str, Any] | None,
        **more: Any,
    ) -> None:
        assert self.driver is not None
        request_id = self.driver.add(
            0, max_tokens, prompt=prompt, extra_args=extra_args, **more
        )
        chunk = self.driver.setup.chunk
        self.chunks[request_id] = (extra_args or {}).get("roco_chunk", chunk)
        if request_id not in self.driver.scheduler.requests:
            self.refused.add(request_id)
        self.lengths[request_id] = (len(prompt), max_tokens)
        self.asked[request_id] = prompt, extra_args

    @precondition(lambda self: self.answered)
    @rule(
        data=st.data(),
        num_question_tokens=st.integers(1, 30),
        max_tokens=st.integers(1, MAX_OUTPUT),
        ignore_stop=st.booleans(),
        options=st.none() | OPTIONS,
    )
    def go_on(
        self,
        data: st.DataObject,
        num_question_tokens: int,
        max_tokens: int,
        ignore_stop: bool,
        options: dict[str, Any] | None,
    ) -> None:
        """Ask a conversation's next question, behind its answer."""
        assert self.driver is not None
        request_id = data.draw(st.sampled_from(self.answered))
        prompt, extra_args = self.asked[request_id]
        end = [*self.driver.setup.turn_end_token_ids[-1:]]
        answer = self.driver.outputs[request_id]
        own = [62 + len(self.lengths) % 60] * num_question_tokens
        prompt = [*prompt, *answer, *end, *own, *end, *CUE]
        if options and self.has_options:
            extra_args = self.arguments(options)
        if len(prompt) <= MAX_PROMPT:
            self.ask(prompt, max_tokens, extra_args, ignore_stop=ignore_stop)

    @property
    def answered(self) -> list[str]:
        """Requests that are done, the longest prompts last."""
        if self.driver is None:
            return []
        done = [name for name in self.asked if name not in self.unfinished]
        return sorted(done, key=lambda name: self.lengths[name])

    @rule(num_steps=st.integers(1, 40))
    def step(self, num_steps: int) -> None:
        assert self.driver is not None
        for _ in range(num_steps):
            self.driver.step()

    @precondition(lambda self: self.driver is not None and self.has_room_in_flight)
    @rule(throttle_prefills=st.booleans())
    def schedule(self, throttle_prefills: bool) -> None:
        assert self.driver is not None
        if self.driver.scheduler.has_requests():
            self.driver.schedule(throttle_prefills=throttle_prefills)

    @rule(state=st.sampled_from([*PauseState, *[PauseState.UNPAUSED] * 3]))
    def pause(self, state: PauseState) -> None:
        assert self.driver is not None
        self.driver.scheduler.set_pause_state(state)

    @precondition(lambda self: self.driver is not None and self.driver.num_in_flight)
    @rule()
    def complete(self) -> None:
        assert self.driver is not None
        self.driver.complete()

    @rule()
    def preempt_all(self) -> None:
        assert self.driver is not None
        self.driver.preempt_all()

    @precondition(lambda self: self.driver is not None and self.unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        assert self.driver is not None
        request_id = data.draw(st.sampled_from(sorted(self.unfinished)))
        self.driver.abort(request_id)
        self.aborted.add(request_id)

    def teardown(self) -> None:
        if self.driver is None:
            return
        self.driver.scheduler.set_pause_state(PauseState.UNPAUSED)
        self.driver.drain(self.steps_to_finish())
        worker = self.driver.worker
        self.done.update(
            {
                "requests": len(self.lengths),
                "scheduled steps": self.driver.num_steps,
                "evictions": worker.num_evictions,
                "hits": worker.num_hits,
                "answers hit": worker.num_answers_hit,
                "snapshots looked at": self.driver.num_snapshot_looks,
            }
        )
        for request_id, (_, max_tokens) in self.lengths.items():
            num_outputs = len(self.driver.outputs[request_id])
            if request_id in self.aborted:
                continue
            if request_id in self.refused:
                assert str(self.driver.finished[request_id].finish_reason) == "error"
                continue
            reason = str(self.driver.finished[request_id].finish_reason)
            assert num_outputs == max_tokens if reason == "length" else reason == "stop"
        assert not len(self.driver.scheduler.request_plans)
        self.driver.scheduler.shutdown()

    @property
    def has_room_in_flight(self) -> bool:
        assert self.driver is not None
        return self.driver.num_in_flight < self.max_steps_in_flight

    @property
    def unfinished(self) -> set[str]:
        assert self.driver is not None
        return set(self.driver.scheduler.requests)

    def steps_to_finish(self) -> int:
        """Return how many steps suffice, one request after the other.

        The oldest request is never preempted, so each needs its own tokens once more
        at most: what it knows in chunks, the rest one by one.
        """
        assert self.driver is not None
        setup = self.driver.setup
        total = 4
        for request_id in self.unfinished:
            num_prompt_tokens, max_tokens = self.lengths[request_id]
            known = num_prompt_tokens + max_tokens
            chunk = self.chunks[request_id]
            stride = BLOCK_SIZE if self.has_options else setup.stride
            total += known // chunk + known // stride + 2 + max_tokens
        # with steps in flight, some are empty: they only wait for a token
        return total * setup.max_steps_in_flight + 8


class AsyncMachine(SchedulerMachine):
    """Asynchronous scheduling."""

    asynchronous = True
    max_steps_in_flight = 2


class DeepAsyncMachine(SchedulerMachine):
    """Asynchronous scheduling over two pipeline stages."""

    asynchronous = True
    max_steps_in_flight = 3


class PipelineMachine(SchedulerMachine):
    """Synchronous scheduling over two pipeline stages."""

    max_steps_in_flight = 2


class PrefixMachine(SchedulerMachine):
    """Requests begin behind prefixes of others."""

    caching = True


class AsyncPrefixMachine(AsyncMachine):
    """Likewise, with asynchronous scheduling."""

    caching = True


class DeepAsyncPrefixMachine(DeepAsyncMachine):
    """Likewise, over two pipeline stages."""

    caching = True


class LongestHitsMachine(PrefixMachine):
    """Requests begin behind answers, too."""

    prefix_hits = "longest"


class DeepAsyncOptionsLongestHitsMachine(DeepAsyncPrefixMachine):
    """Likewise, asynchronously, over two pipeline stages and with options."""

    has_options = True
    prefix_hits = "longest"


class OptionsMachine(SchedulerMachine):
    """Requests evict as they ask for."""

    has_options = True


class AsyncOptionsPrefixMachine(AsyncPrefixMachine):
    """Likewise, asynchronously and behind prefixes of others."""

    has_options = True


class DeepAsyncOptionsPrefixMachine(DeepAsyncPrefixMachine):
    """Likewise, over two pipeline stages."""

    has_options = True


class WindowsMachine(PrefixMachine):
    """Other layers have windows, a shorter one and a longer one than most chunks."""

    windows = (3, 30)


class AsyncOptionsWindowsMachine(AsyncOptionsPrefixMachine):
    """Likewise, asynchronously and with options."""

    windows = (30, 3)


class DeepAsyncWindowsMachine(DeepAsyncPrefixMachine):
    """Likewise, over two pipeline stages."""

    windows = (13,)


MACHINES = [
    SchedulerMachine,
    AsyncMachine,
    DeepAsyncMachine,
    PipelineMachine,
    PrefixMachine,
    AsyncPrefixMachine,
    DeepAsyncPrefixMachine,
    LongestHitsMachine,
    DeepAsyncOptionsLongestHitsMachine,
    OptionsMachine,
    AsyncOptionsPrefixMachine,
    DeepAsyncOptionsPrefixMachine,
    WindowsMachine,
    AsyncOptionsWindowsMachine,
    DeepAsyncWindowsMachine,
]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_requests_in_any_order(machine: type[SchedulerMachine]) -> None:
    """`-rP` prints how much was done; `--hypothesis-profile=nightly` does more."""
    is_nightly = settings().max_examples >= NIGHTLY_EXAMPLES
    examples = 2 * settings().max_examples if is_nightly else EXAMPLES
    machine.done.clear()
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=25)
    )
    print(dict(machine.done))
    least = LEAST_NIGHTLY_STEPS if is_nightly else LEAST_STEPS
    assert machine.done["steps"] >= least
