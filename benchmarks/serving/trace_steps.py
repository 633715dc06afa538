# SPDX-License-Identifier: Apache-2.0
"""Reads the decode steps of an engine from a trace of PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

SCHEDULER = "scheduler: "
"""What annotations of the scheduler begin with."""

_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Steps:
    """Steps from their first kernel to the next one's, so that they end with sampling.

    Attributes:
        times: A row for each step, in microseconds: `step_us`, `idle_us` in which the
            GPU did nothing, and `scheduler_us` of the scheduler that ran meanwhile, for
            a later step; NaN if the trace does not tell.
        calls: `step`, `kernel` and microseconds `us` of every call that begins in one.
    """

    times: pd.DataFrame
    calls: pd.DataFrame

    def where(self, chosen: pd.Series[bool]) -> Steps:
        """Return the steps that are chosen, with their calls."""
        times = self.times[chosen]
        return Steps(times, self.calls[self.calls["step"].isin(times.index)])


def decode_steps(trace: Mapping[str, Any], batch: int) -> Steps:
    """Return every step in which all rows decode.

    Args:
        trace: What PyTorch's profiler wrote.
        batch: Rows of the steps that are asked for.

    Raises:
        ValueError: The trace has no such steps.
    """
    events = pd.DataFrame([event for event in trace["traceEvents"] if "dur" in event])
    work = events[events["cat"].isin(_WORK)]
    stream = work.loc[work["cat"] == "kernel", "tid"].mode()[:1]
    marks = events[
        (events["cat"] == "gpu_user_annotation")
        & events["name"].str.startswith("execute_")
        & events["tid"].isin(stream)
    ].sort_values("ts")
    starts = marks["ts"].to_numpy()
    wanted = f"execute_context_0(0)_generation_{batch}({batch})"
    # the last one has no end
    steps = np.flatnonzero(marks["name"].iloc[:-1] == wanted)
    if not len(steps):
        raise ValueError(
            f"the trace has no step {wanted!r}, but "
            f"{marks['name'].value_counts().to_dict()}; its categories are "
            f"{events['cat'].value_counts().to_dict()}"
        )

    def in_steps(found: pd.DataFrame) -> pd.DataFrame:
        found = found.assign(step=starts.searchsorted(found["ts"], "right") - 1)
        return found[found["step"].isin(steps)]

    busy = np.interp(starts, *_busy_until(work))
    is_scheduler = (events["cat"] == "user_annotation") & events["name"].str.startswith(
        SCHEDULER
    )
    scheduler = in_steps(events[is_scheduler]).groupby("step")["dur"].sum()
    times = pd.DataFrame({"step_us": np.diff(starts)[steps]}, index=steps)
    times["idle_us"] = times["step_us"] - np.diff(busy)[steps]
    times["scheduler_us"] = scheduler.reindex(
        steps, fill_value=0 if is_scheduler.any() else np.nan
    )
    calls = in_steps(work)
    kernel = calls["name"].where(calls["cat"] == "kernel", calls["cat"])
    return Steps(
        times, calls[["step"]].assign(kernel=kernel, us=calls["dur"]).reset_index()
    )


def _busy_until(work: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return moments, and how long the GPU had worked on anything until each."""
    work = work.sort_values("ts")
    end = work["ts"] + work["dur"]
    # work that begins while other work goes on belongs to the same span
    span = (work["ts"] > end.cummax().shift()).cumsum()
    begins, ends = work["ts"].groupby(span).min(), end.groupby(span).max()
    moments = np.column_stack([begins, ends]).ravel()
    lengths = np.column_stack([0 * begins, ends - begins]).ravel()
    return moments, lengths.cumsum()
