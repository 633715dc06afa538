# SPDX-License-Identifier: Apache-2.0
"""Schedulers whose work shows in the traces of vLLM's profiler.

vLLM annotates the model's steps, but of the scheduler only parts. The schedulers run in
the thread that starts the profiler, as long as the engine has one GPU.
"""

from __future__ import annotations

from typing import Any

from torch.profiler import record_function
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from benchmarks.serving.trace_steps import SCHEDULER
from vllm_roco.scheduler import RocoAsyncScheduler


class _Annotated:
    """Put before a scheduler class."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        with record_function(f"{SCHEDULER}schedule"):
            return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        with record_function(f"{SCHEDULER}update_from_output"):
            return super().update_from_output(*args, **kwargs)  # type: ignore[misc]


class AnnotatedScheduler(_Annotated, AsyncScheduler):
    """vLLM's own."""


class AnnotatedRocoScheduler(_Annotated, RocoAsyncScheduler):
    """RoCo's."""


def scheduler_class(*, roco: bool) -> str:
    """Return what `--scheduler-cls` takes."""
    kind = AnnotatedRocoScheduler if roco else AnnotatedScheduler
    return f"{__name__}.{kind.__name__}"
