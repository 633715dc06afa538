# SPDX-License-Identifier: Apache-2.0
"""What happens in an engine step by step, seen from its scheduler and its pages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.engine.engines import Engine
from tests.oracle import Options
from vllm_roco.kv_cache.integrity import check_integrity
from vllm_roco.kv_cache.page import page_view


@dataclass(frozen=True)
class Preemption:
    """A running request that loses its blocks, with its lengths at that moment."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int


@dataclass
class Steps:
    """What a recording saw.

    Attributes:
        scheduled: Per step, the tokens scheduled for each request id.
        preemptions: In the order in which they happened.
        peak_held_blocks: The most blocks that the manager held for one request.
    """

    scheduled: list[dict[str, int]] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)
    peak_held_blocks: int = 0


def most_held_blocks(options: Options, steps_in_flight: int) -> int:
    """Return the design's bound on the blocks that one sequence holds."""
    in_flight = math.ceil(steps_in_flight * options.chunk / options.block_size)
    return options.budget_blocks + options.stride_blocks + in_flight + 1


@contextlib.contextmanager
def recorded_steps(engine: Engine) -> Iterator[Steps]:
    """Record every step that computes something while the context lasts."""
    steps = Steps()
    scheduler = engine.scheduler
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def record_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        if output.num_scheduled_tokens:
            steps.scheduled.append(dict(output.num_scheduled_tokens))
        return output

    def record_preemption(request: Any, *args: Any, **kwargs: Any) -> None:
        steps.preemptions.append(
            Preemption(
                request.request_id,
                request.num_prompt_tokens,
                request.num_computed_tokens,
            )
        )
        preempt(request, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "schedule", record_schedule)
        patch.setattr(scheduler, "_preempt_request", record_preemption)
        yield steps


@contextlib.contextmanager
def audited_manager(engine: Engine) -> Iterator[Steps]:
    """Record steps as `recorded_steps`, and look into the manager after each of them.

    Raises:
        RuntimeError: The manager's books are wrong.
    """
    scheduler, manager = engine.scheduler, engine.manager
    update = scheduler.update_from_output
    with recorded_steps(engine) as steps, pytest.MonkeyPatch.context() as patch:
        schedule = scheduler.schedule

        def look() -> None:
            check_integrity(manager)
            held = [manager.held_blocks(name) for name in manager.req_to_blocks]
            assert max(held, default=0) == manager.held.largest
            steps.peak_held_blocks = max(steps.peak_held_blocks, *held, 0)

        def audit_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            look()
            return output

        def audit_update(*args: Any, **kwargs: Any) -> Any:
            outputs = update(*args, **kwargs)
            look()
            return outputs

        patch.setattr(scheduler, "schedule", audit_schedule)
        patch.setattr(scheduler, "update_from_output", audit_update)
        yield steps


@contextlib.contextmanager
def poisoned_free_blocks(engine: Engine) -> Iterator[None]:
    """Fill every block that is nobody's and no snapshot's before each step.

    Where some layers are not RoCo's, with a large number: they do not stand what is
    none behind the end of a sequence.
    """
    others = engine.other_kv_caches
    pages = [page_view(cache) for cache in engine.kv_caches]
    if not others:
        pages = [page.view(torch.int8) for page in pages]
    # all bits set is not a number in every dtype
    poison_value = -1
    if others:
        # of bytes, those of the largest float8 e4m3
        poison_value = 0x7E if others[0].dtype == torch.uint8 else 10_000
    pool = engine.scheduler.kv_cache_manager.block_pool
    executor = engine.core.model_executor
    execute = executor.execute_model

    def poison_and_execute(*args: Any, **kwargs: Any) -> Any:
        poison()
        return execute(*args, **kwargs)

    def poison() -> None:
        free = pool.free_block_queue.get_all_free_blocks()
        unused = [x.block_id for x in free if x.block_hash is None]
        blocks = torch.tensor([pool.null_block.block_id, *unused])
        for layer in [*pages, *others]:
            layer[blocks] = poison_value

    poison()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "execute_model", poison_and_execute)
        yield
