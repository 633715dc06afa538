# SPDX-License-Identifier: Apache-2.0
"""Rows find their requests, through runners that are made up."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.attention.rig import config_for
from vllm_roco.attention import request_rows as module
from vllm_roco.attention.request_rows import RequestRows, request_rows, watch_runners
from vllm_roco.eviction_row import ROW_KEY

OPTIONS = {"budget": 64, "stride": 32, "sink": 0, "recent": 0}


class Runner:
    """What both of vLLM's runners have in common; a step goes through `begin`."""

    arrives = ""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.rows = request_rows(vllm_config, vllm_config.cache_config.block_size)

    def begin(
        self,
        new: dict[str, list[int] | None] | None = None,
        finished: tuple[str, ...] = (),
    ) -> Any:
        requests = [
            SimpleNamespace(req_id=name, sampling_params=params_with(row))
            for name, row in (new or {}).items()
        ]
        step = SimpleNamespace(
            scheduled_new_reqs=requests, finished_req_ids=set(finished)
        )
        return getattr(self, self.arrives)(step)

    def _dummy_run(self, slots: Any, num_reqs: int) -> torch.Tensor | None:
        return self.of(slots, num_reqs)

    def of(self, slots: Any, num_reqs: int) -> torch.Tensor | None:
        slots = None if slots is None else np.array(slots)
        common: Any = SimpleNamespace(req_idx=slots, num_reqs=num_reqs)
        return self.rows.of_step(common)


def params_with(row: list[int] | None) -> Any:
    return SimpleNamespace(extra_args=None if row is None else {ROW_KEY: row, "x": 1})


class Slots(Runner):
    """As V2: a request has a slot until it ends, the lowest that is free."""

    arrives = "add_requests"

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.req_states = SimpleNamespace(req_id_to_index={})

    def add_requests(self, scheduler_output: Any) -> str:
        taken = self.req_states.req_id_to_index
        for request in scheduler_output.scheduled_new_reqs:
            taken[request.req_id] = min(set(range(4)) - set(taken.values()))
        return "result"


class Places(Runner):
    """As V1: the batch has an order of its own."""

    arrives = "_update_states"

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.input_batch = SimpleNamespace(req_ids=[])

    def _update_states(self, scheduler_output: Any) -> str:
        return "result"


@pytest.fixture(autouse=True)
def runners(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, kind in ((module.RUNNER_V2, Slots), (module.RUNNER_V1, Places)):
        fake: Any = ModuleType(name)
        fake.GPUModelRunner = type(kind.__name__, (kind,), {})
        monkeypatch.setitem(module.sys.modules, name, fake)
    watch_runners()
    # each method is wrapped once, however many layers there are
    watch_runners()
    yield


def runner(name: str, vllm_config: Any = None) -> Any:
    kind = module.sys.modules[name].GPUModelRunner
    return kind(vllm_config or config_for(OPTIONS))


@pytest.fixture
def slots() -> Any:
    return runner(module.RUNNER_V2)


@pytest.fixture
def places() -> Any:
    return runner(module.RUNNER_V1)


A, B = [2, 1, 96, 0, 16, 1, 0, 0], [8, 4, 0, 16, 0, 0, 3, 7]


def test_default_is_the_server_s_and_one_object_serves_an_engine() -> None:
    config = config_for({**OPTIONS, "stride": 128, "chunk": 128})
    rows = request_rows(config, 16)
    assert rows is request_rows(config, 16)
    # a stride above the budget is the server's to choose
    assert rows.default[:2] == (4, 8)
    assert request_rows(config_for(OPTIONS), 16) is not rows


def test_groups_of_other_block_sizes_have_rows_of_their_own() -> None:
    """The second group got the first one's, twice as many tokens."""
    config = config_for(OPTIONS)
    small, large = request_rows(config, 16), request_rows(config, 32)
    assert small.default.resident_blocks == 2 * large.default.resident_blocks
    assert request_rows(config, 16) is small


def test_rows_go_with_their_engine() -> None:
    config = config_for(OPTIONS)
    request_rows(config, 16)
    key = id(config)
    assert key in module._rows
    del config
    gc.collect()
    assert key not in module._rows


def test_nothing_is_looked_up_while_no_request_brings_options(
    slots: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slots.begin({"a": None, "b": None}) == "result"
    monkeypatch.setattr(slots.rows, "_table", None)
    assert slots.of([1, 0], 2) is None


def test_slots(slots: Any) -> None:
    assert slots.begin({"a": A, "b": None, "c": B}) == "result"
    default = list(slots.rows.default)
    rows = slots.of([2, 1, 0], 3)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [B, default, A]
    # a captured graph has more rows than there are requests
    assert slots.of([0], 3).tolist() == [A, default, default]
    assert slots.of([1], 1) is None


def test_a_slot_that_is_used_again(slots: Any) -> None:
    slots.begin({"a": A})
    del slots.req_states.req_id_to_index["a"]
    # while nobody has options, too
    slots.begin({"b": None}, finished=("a",))
    slots.begin({"c": B})
    assert slots.of([0, 1], 2).tolist() == [list(slots.rows.default), B]


def test_a_preempted_request_comes_again_as_a_new_one(slots: Any) -> None:
    slots.begin({"a": A, "b": B})
    # preempted, and resumed in another slot
    del slots.req_states.req_id_to_index["a"]
    slots.begin({"c": None})
    slots.begin({"a": A})
    default = list(slots.rows.default)
    assert slots.of([2, 1, 0], 3).tolist() == [A, B, default]


@pytest.mark.parametrize("name", [module.RUNNER_V1, module.RUNNER_V2])
def test_an_id_that_ends_and_comes_again_in_one_step(name: str) -> None:
    served = runner(name)
    served.begin({"a": A, "b": B})
    if name == module.RUNNER_V1:
        served.input_batch.req_ids = ["a", "b"]
    else:
        del served.req_states.req_id_to_index["a"]
    served.begin({"a": None}, finished=("a",))
    order = None if name == module.RUNNER_V1 else [0, 1]
    assert served.of(order, 2).tolist() == [list(served.rows.default), B]


def test_a_batch_that_is_ordered_anew(places: Any) -> None:
    places.input_batch.req_ids = ["a", "b", "c"]
    assert places.begin({"a": A, "b": None, "c": B}) == "result"
    default = list(places.rows.default)
    assert places.of(None, 3).tolist() == [A, default, B]
    # a pause, and another order
    places.input_batch.req_ids = ["c", "b"]
    places.begin()
    assert places.of(None, 3).tolist() == [B, default, default]
    places.input_batch.req_ids = ["a", "c"]
    places.begin(finished=("b",))
    assert places.of(None, 2).tolist() == [A, B]
    places.input_batch.req_ids = ["d"]
    places.begin({"d": None}, finished=("a", "c"))
    assert places.of(None, 1) is None
    assert not places.rows._own


def test_dummy_batches_evict_and_measure_nothing(slots: Any) -> None:
    """They name slots of requests that live, and may stand in their pages."""
    at_rest = list(slots.rows.default._replace(until=0))
    assert slots._dummy_run([0, 1], num_reqs=2).tolist() == [at_rest] * 2
    assert slots.of([0, 1], 2) is None
    slots.begin({"a": A, "b": B})
    assert slots._dummy_run([0, 1], num_reqs=3).tolist() == [at_rest] * 3
    assert slots.of([0, 1], 2).tolist() == [A, B]

    def fail() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        slots.rows.dummy_run(fail)
    assert slots.of([0, 1], 2) is not None


def test_a_runner_of_another_engine_is_left_alone(slots: Any) -> None:
    other = runner(module.RUNNER_V2)
    other.begin({"a": A})
    assert slots.of([0], 1) is None
    assert other.of([0], 1).tolist() == [A]
    stranger = runner(module.RUNNER_V2)
    stranger.vllm_config = SimpleNamespace()
    assert stranger.begin({"a": A}) == "result"
    assert isinstance(stranger.rows, RequestRows)
    assert stranger.of([0], 1) is None
