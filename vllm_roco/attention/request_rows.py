# SPDX-License-Identifier: Apache-2.0
"""The rows of a worker's requests, in the order of a step's batch.

The scheduler puts a row into the sampling parameters of each request that does not go
by the server's defaults (`ROW_KEY`), and vLLM carries these to every worker. Nothing
public leads from there to a metadata builder, so the methods of vLLM's model runners
through which requests arrive are wrapped, once in each process that builds a layer.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_roco.eviction_row import NUM_ROW_FIELDS, ROW_KEY, EvictionRow
from vllm_roco.validation import request_planner

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput

RUNNER_V1 = "vllm.v1.worker.gpu_model_runner"
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"
"""Modules of vLLM's model runners, each with a `GPUModelRunner`."""


class RequestRows:
    """What each request of one engine's worker evicts by.

    Args:
        default: Of requests that bring no options.
        max_num_reqs: Most requests of a batch.

    Attributes:
        default: Likewise.
    """

    def __init__(self, default: EvictionRow, max_num_reqs: int) -> None:
        self.default = default
        self._default = np.array(default, dtype=np.int32)
        self._at_rest = np.array(default._replace(until=0), dtype=np.int32)
        # by slot in the V2 runner, by place in the batch in the V1 runner
        self._table = np.tile(self._default, (max_num_reqs, 1))
        self._own: dict[str, np.ndarray] = {}
        self._in_dummy_run = False

    def of_step(self, common: CommonAttentionMetadata) -> torch.Tensor | None:
        """Return the rows of a step's batch, None if all are the default.

        Args:
            common: The step, or a dummy batch, whose rows evict and measure nothing:
                with vLLM's first runner it may stand in pages of requests that live.

        Returns:
            `[num_reqs, NUM_ROW_FIELDS]` int32 on the host, a copy. Rows of padding are
            the default.
        """
        if self._in_dummy_run:
            return torch.from_numpy(np.tile(self._at_rest, (common.num_reqs, 1)))
        if not self._own:
            return None
        slots = common.req_idx
        found = self._table[: common.num_reqs if slots is None else None]
        if slots is not None:
            found = found[slots]
        if (found == self._default).all():
            return None
        rows = np.tile(self._default, (common.num_reqs, 1))
        rows[: len(found)] = found
        return torch.from_numpy(rows)

    def arrive(self, step: SchedulerOutput) -> None:
        """Learn the rows of a step's new requests, and forget those that ended."""
        for request_id in step.finished_req_ids:
            self._own.pop(request_id, None)
        for request in step.scheduled_new_reqs:
            row = _row_in(request.sampling_params)
            if row is None:
                # an id may come again
                self._own.pop(request.req_id, None)
            else:
                self._own[request.req_id] = row

    def put(self, places: Iterable[tuple[str, int]]) -> None:
        """Note where requests are in the table: their ids, each with its place."""
        for request_id, place in places:
            self._table[place] = self._own.get(request_id, self._default)

    def put_batch(self, request_ids: list[str]) -> None:
        """Note that these requests are the batch, in this order."""
        if self._own:
            self._table[:] = self._default
            self.put(zip(request_ids, range(len(request_ids)), strict=True))

    def dummy_run(self, run: Callable[[], Any]) -> Any:
        """Return what `run` returns; the rows of batches that it makes are at rest."""
        self._in_dummy_run = True
        try:
            return run()
        finally:
            self._in_dummy_run = False


# of each engine by its configuration's identity, and by block size
_rows: dict[int, dict[int, RequestRows]] = {}


def request_rows(vllm_config: VllmConfig, block_size: int) -> RequestRows:
    """Return the rows of a worker's requests, the same for groups of one block size.

    Args:
        vllm_config: The very object that the model runner has.
        block_size: Tokens per block of the layers that evict.
    """
    key = id(vllm_config)
    if key not in _rows:
        _rows[key] = {}
        weakref.finalize(vllm_config, _rows.pop, key)
    sizes = _rows[key]
    if block_size not in sizes:
        sizes[block_size] = RequestRows(
            request_planner(vllm_config, block_size).plan(None, 1).row,
            vllm_config.scheduler_config.max_num_seqs,
        )
    return sizes[block_size]


def watch_runners() -> None:
    """Learn from now on of the requests that arrive at model runners.

    To be called while a runner builds its layers: its module is there by then, and no
    request has arrived.
    """
    for module, arrives, learn in (
        (RUNNER_V2, "add_requests", _learn_slots),
        (RUNNER_V1, "_update_states", _learn_batch),
    ):
        if module in sys.modules:
            runner = sys.modules[module].GPUModelRunner
            _wrap(runner, arrives, functools.partial(_then, learn))
            _wrap(runner, "_dummy_run", _as_dummy)


def _wrap(cls: type, name: str, around: Callable[..., Any]) -> None:
    """Let a method of a class be called through `around`, unless it is already."""
    method = getattr(cls, name)
    if hasattr(method, "_of_roco"):
        return

    @functools.wraps(method)
    def wrapped(runner: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(method, runner, *args, **kwargs)
        sizes = _rows.get(id(runner.vllm_config))
        return around(sizes.values(), runner, call) if sizes else call()

    wrapped._of_roco = True  # type: ignore[attr-defined]
    setattr(cls, name, wrapped)


def _as_dummy(
    sizes: Iterable[RequestRows], runner: Any, call: Callable[[], Any]
) -> Any:
    for rows in sizes:
        call = functools.partial(rows.dummy_run, call)
    return call()


def _then(
    learn: Callable[[RequestRows, Any, SchedulerOutput], None],
    sizes: Iterable[RequestRows],
    runner: Any,
    call: functools.partial[Any],
) -> Any:
    result = call()
    (step,) = (*call.args[1:], *call.keywords.values())
    for rows in sizes:
        rows.arrive(step)
        learn(rows, runner, step)
    return result


def _learn_slots(rows: RequestRows, runner: Any, step: SchedulerOutput) -> None:
    slots = runner.req_states.req_id_to_index
    ids = [request.req_id for request in step.scheduled_new_reqs]
    rows.put((request_id, slots[request_id]) for request_id in ids)


def _learn_batch(rows: RequestRows, runner: Any, step: SchedulerOutput) -> None:
    rows.put_batch(runner.input_batch.req_ids)


def _row_in(params: SamplingParams | None) -> np.ndarray | None:
    row = ((params and params.extra_args) or {}).get(ROW_KEY)
    if row is None:
        return None
    return np.array(row, dtype=np.int32).reshape(NUM_ROW_FIELDS)
