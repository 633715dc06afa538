# SPDX-License-Identifier: Apache-2.0
"""Reads the decode steps of an engine from a trace of PyTorch's profiler."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.annotated_scheduler import PREFIX

_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Step:
    """From the first kernel of a step to the next one's, so that it ends with sampling.

    Attributes:
        start: Microseconds.
        end: Microseconds.
        kernels: Microseconds of each call of each kernel that begins in between.
        busy_us: How long the GPU worked on anything.
        scheduler_us: How long the scheduler took that ran meanwhile, for a later step;
            NaN if the trace does not tell.
    """

    start: float
    end: float
    kernels: dict[str, list[float]] = field(default_factory=dict)
    busy_us: float = 0.0
    scheduler_us: float = 0.0

    @property
    def step_us(self) -> float:
        """From the start to the end."""
        return self.end - self.start

    @property
    def idle_us(self) -> float:
        """How long the GPU did nothing."""
        return self.step_us - self.busy_us


def decode_steps(trace: Mapping[str, Any], batch: int) -> list[Step]:
    """Return every step in which all rows decode.

    Args:
        trace: What PyTorch's profiler wrote.
        batch: Rows of the steps that are asked for.

    Raises:
        ValueError: The trace has no such steps.
    """
    events = [event for event in trace["traceEvents"] if "dur" in event]
    work = [event for event in events if event.get("cat") in _WORK]
    stream = Counter(e["tid"] for e in work if e["cat"] == "kernel").most_common(1)
    marks = sorted(
        (event["ts"], event["name"])
        for event in events
        if event.get("cat") == "gpu_user_annotation"
        and event["name"].startswith("execute_")
        and stream
        and event["tid"] == stream[0][0]
    )
    wanted = f"execute_context_0(0)_generation_{batch}({batch})"
    starts = [start for start, _ in marks]
    steps = {
        # the last one has no end
        index: Step(start, starts[index + 1])
        for index, (start, name) in enumerate(marks[:-1])
        if name == wanted
    }
    if not steps:
        raise ValueError(
            f"the trace has no step {wanted!r}, but {Counter(n for _, n in marks)}; "
            f"its categories are {Counter(event.get('cat') for event in events)}"
        )

    def step_at(time: float) -> Step | None:
        return steps.get(bisect.bisect_right(starts, time) - 1)

    for event in work:
        if step := step_at(event["ts"]):
            name = event["name"] if event["cat"] == "kernel" else event["cat"]
            step.kernels.setdefault(name, []).append(event["dur"])
    spans = _merged((event["ts"], event["ts"] + event["dur"]) for event in work)
    for step in steps.values():
        # from the span that the step may begin within
        first = max(0, bisect.bisect_right(spans, (step.start, math.inf)) - 1)
        for begin, end in itertools.islice(spans, first, None):
            if begin >= step.end:
                break
            step.busy_us += max(0.0, min(end, step.end) - max(begin, step.start))
    scheduler = [
        event
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    ]
    if not scheduler:
        for step in steps.values():
            step.scheduler_us = math.nan
    for event in scheduler:
        if step := step_at(event["ts"]):
            step.scheduler_us += event["dur"]
    return list(steps.values())


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the times that any span covers, in their order."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged
