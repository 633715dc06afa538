# SPDX-License-Identifier: Apache-2.0
"""The trace file: what it says, when it can be read, and how it fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_roco.observability.trace import TraceWriter


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(path)], timeout=60, text=True, check=False
    )


def test_a_line_tells_step_request_tokens_and_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = TraceWriter(str(path))
    before = time.time()
    trace.write(7, 'odd "id"\n', 512, 18)
    trace.close()
    (record,) = records(path)
    assert before - 1 < record.pop("time") < time.time() + 1  # type: ignore[operator]
    assert record == {
        "step": 7,
        "request": 'odd "id"\n',
        "computed_tokens": 512,
        "held_blocks": 18,
    }


def test_a_flushed_step_is_there_while_the_engine_runs(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = TraceWriter(str(path))
    for step in range(3):
        for request in ("a", "b"):
            trace.write(step, request, 16 * step, step)
        trace.flush()
        assert len(records(path)) == 2 * (step + 1)
    trace.close()
    trace.close()


def test_a_killed_engine_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    code = (
        "import os, signal, sys\n"
        "from vllm_roco.observability.trace import TraceWriter\n"
        "trace = TraceWriter(sys.argv[1])\n"
        "trace.write(0, 'a', 16, 1)\n"
        "trace.flush()\n"
        "trace.write(1, 'a', 32, 2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert run_python(code, path).returncode == -signal.SIGKILL
    assert [record["step"] for record in records(path)] == [0]


def test_leaving_python_flushes(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    code = (
        "import sys\n"
        "from vllm_roco.observability.trace import TraceWriter\n"
        "trace = TraceWriter(sys.argv[1])\n"
        "trace.write(0, 'a', 16, 1)\n"
    )
    assert run_python(code, path).returncode == 0
    assert len(records(path)) == 1


def test_a_new_engine_replaces_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    for step in (1, 2):
        trace = TraceWriter(str(path))
        trace.write(step, "a", 16, 1)
        trace.close()
    assert [record["step"] for record in records(path)] == [2]


def test_data_parallel_engines_write_beside_the_first(tmp_path: Path) -> None:
    for engine in range(3):
        trace = TraceWriter(str(tmp_path / "trace.jsonl"), engine)
        trace.write(engine, "a", 16, 1)
        trace.close()
    for engine, name in enumerate(("trace", "trace.dp1", "trace.dp2")):
        (record,) = records(tmp_path / f"{name}.jsonl")
        assert record["step"] == engine


def test_the_home_directory_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    TraceWriter("~/trace.jsonl").close()
    assert (tmp_path / "trace.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing/trace.jsonl", "No such file"), (".", "Is a directory")],
    ids=["no-directory", "is-a-directory"],
)
def test_a_path_that_cannot_be_written_is_named(
    name: str, reason: str, tmp_path: Path
) -> None:
    path = str(tmp_path / name)
    with pytest.raises(ValueError, match=f"(?s)trace = .*{reason}.*leave trace out"):
        TraceWriter(path)
