# SPDX-License-Identifier: Apache-2.0
"""A wall clock that is set back, as by an administrator."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from tests.observability.publishing import publisher
from vllm_roco.observability.metrics import read_engines
from vllm_roco.observability.trace import TraceWriter

HOUR = 3600.0


def test_numbers_and_trace_go_on(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files from the future are neither swept nor passed over."""
    now = time.time()
    path = tmp_path / "trace.jsonl"
    with contextlib.closing(publisher()) as first:
        first.publish(1, 16)
        trace = TraceWriter(str(path))
        trace.write(0, "a", 16, 1)
        for file in directory.iterdir():
            os.utime(file, (now + HOUR, now + HOUR))
        monkeypatch.setattr(time, "time", lambda: now - HOUR)
        first.publish(2, 32)
        trace.write(1, "a", 32, 2)
        trace.close()
        # it sweeps what dead engines have left
        with contextlib.closing(publisher(instance_id="2")):
            first.publish(3, 48)
            freed = [metrics.freed_blocks for metrics in read_engines()]
    assert sorted(freed) == [0, 3]
    assert len(path.read_text().splitlines()) == 2
