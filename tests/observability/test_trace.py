# SPDX-License-Identifier: Apache-2.0
"""The trace file: what it says, when it can be read, and how it fails."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_roco.observability.trace import TraceWriter, check_path


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
    trace.write(8, "new", 512, 18, 0)
    trace.write(8, "hit", 512, 18, 384)
    trace.close()
    record, *others = records(path)
    assert before - 1 < record.pop("time") < time.time() + 1  # type: ignore[operator]
    assert record == {
        "step": 7,
        "request": 'odd "id"\n',
        "computed_tokens": 512,
        "held_blocks": 18,
    }
    # of those that are let in in this step, the prefix too
    assert [other["hit_tokens"] for other in others] == [0, 384]


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


def test_a_removed_home_is_named() -> None:
    with pytest.raises(
        ValueError, match="trace = '~nobody-of-that-name/t'.*no such home"
    ):
        check_path("~nobody-of-that-name/t")


def link_to_nowhere(path: Path) -> str:
    path.symlink_to(path.with_name("real.jsonl"))
    return str(path)


def link_into_nowhere(path: Path) -> str:
    path.symlink_to(path.with_name("missing") / "real.jsonl")
    return str(path)


def link_to_itself(path: Path) -> str:
    path.symlink_to(path)
    return str(path)


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


def listening_socket(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return str(path)


def below_a_file(path: Path) -> str:
    path.touch()
    return str(path / "trace.jsonl")


def below_nothing(path: Path) -> str:
    return str(path / "trace.jsonl")


def directory_itself(path: Path) -> str:
    return str(path.parent)


def with_a_null(path: Path) -> str:
    return f"{path}\0"


REFUSED = pytest.mark.parametrize(
    ("make", "reason"),
    [
        (below_nothing, "No such file"),
        (below_a_file, "Not a directory"),
        (directory_itself, "Is a directory"),
        (link_into_nowhere, "No such file"),
        (link_to_itself, "symbolic links"),
        (pipe, "it is a pipe"),
        (listening_socket, "it is a pipe"),
        (with_a_null, "null character"),
    ],
)
STARTS = pytest.mark.parametrize("start", [check_path, TraceWriter])


@STARTS
@REFUSED
def test_a_path_that_cannot_be_written_is_named(
    start: Callable[[str], object],
    make: Callable[[Path], str],
    reason: str,
    tmp_path: Path,
) -> None:
    """A pipe without a reader stopped the start for ever."""
    path = make(tmp_path / "trace.jsonl")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"(?s)trace = .*{reason}.*leave trace out"):
        start(path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_pipe_with_a_reader_is_refused_too(tmp_path: Path) -> None:
    path = Path(pipe(tmp_path / "trace.jsonl"))
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(ValueError, match="it is a pipe"):
        TraceWriter(str(path))
    os.close(reader)


@STARTS
def test_a_terminal_is_refused(start: Callable[[str], object]) -> None:
    """It stops who writes to it when its user presses Ctrl-S."""
    primary, secondary = os.openpty()
    with pytest.raises(ValueError, match="it is a terminal"):
        start(os.ttyname(secondary))
    os.close(primary)
    os.close(secondary)


@STARTS
@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/stderr", "/proc/self/fd/1"])
@pytest.mark.parametrize("goes_to", ["pipe", "file"])
def test_the_output_of_the_server_is_refused(
    start: Callable[[str], object], path: str, goes_to: str, tmp_path: Path
) -> None:
    """A log that the output goes to was emptied."""
    code = (
        "import sys\n"
        f"from vllm_roco.observability.trace import {start.__name__}\n"
        "print('before', flush=True)\n"
        "try:\n"
        f"    {start.__name__}({path!r})\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    log = tmp_path / "log"
    if goes_to == "pipe":
        output = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        ).stdout
    else:
        with log.open("w") as file:
            subprocess.run(
                [sys.executable, "-c", code], stdout=file, stderr=file, check=False
            )
        output = log.read_text()
    before, refusal = output.splitlines()
    assert before == "before"
    assert refusal.startswith(f"roco: trace = {path!r} cannot be written: ")
    assert ("pipe" if goes_to == "pipe" else "output of vLLM") in refusal


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full"])
def test_a_device_that_never_waits_is_taken(path: str) -> None:
    check_path(path)
    # two servers may throw their traces away
    traces = [TraceWriter(path), TraceWriter(path)]
    traces[0].close()
    traces[1].close()


def test_the_check_leaves_a_link_as_it_is(tmp_path: Path) -> None:
    """It made the file that the link leads to, and then removed the link."""
    path = tmp_path / "trace.jsonl"
    link_to_nowhere(path)
    before = sorted(tmp_path.iterdir())
    check_path(str(path))
    assert sorted(tmp_path.iterdir()) == before
    trace = TraceWriter(str(path))
    trace.write(1, "a", 16, 1)
    trace.close()
    assert path.is_symlink()
    assert len(records(tmp_path / "real.jsonl")) == 1


def test_a_directory_that_is_not_ours_to_write_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("needs a user who may not write everywhere; root may")
    tmp_path.chmod(0o500)
    for start in (check_path, TraceWriter):
        with pytest.raises(ValueError, match="Permission denied"):
            start(str(tmp_path / "trace.jsonl"))


HOLD = """
import sys
from vllm_roco.observability.trace import TraceWriter
trace = TraceWriter(sys.argv[1])
trace.write(1, "first", 16, 1)
trace.flush()
print("ready", flush=True)
input()
"""


@contextlib.contextmanager
def another_engine(path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_two_engines_do_not_share_a_file(tmp_path: Path) -> None:
    """Each emptied what the other had written."""
    path = tmp_path / "trace.jsonl"
    with another_engine(path) as other:
        # an API server may ask when the engine is there already
        check_path(str(path))
        for _ in range(2):
            with pytest.raises(
                ValueError, match="another engine is .*one for each server"
            ):
                TraceWriter(str(path))
        assert [record["request"] for record in records(path)] == ["first"]
        TraceWriter(str(path), engine=1).close()
        other.kill()
        other.wait(60)
        # however it ended, its file is free
        TraceWriter(str(path)).close()
    assert records(path) == []


def test_two_engines_of_one_process_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = TraceWriter(str(path))
    with pytest.raises(ValueError, match="another engine is"):
        TraceWriter(str(path))
    trace.write(1, "a", 16, 1)
    trace.close()
    assert len(records(path)) == 1
    dropped = TraceWriter(str(path))
    del dropped
    TraceWriter(str(path)).close()


QUOTA = """
import resource, sys
from vllm_roco.observability.trace import TraceWriter
trace = TraceWriter(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    for step in range(100):
        trace.write(step, "a", 16, 1)
        trace.write(step, "b", 16, 1)
        trace.flush()
except OSError as error:
    print(error)
"""


def test_without_room_the_last_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    run = subprocess.run(
        [sys.executable, "-c", QUOTA, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "File too large" in run.stdout
    steps = [record["step"] for record in records(path)]
    assert steps == [step for step in range(len(steps) // 2) for _ in "ab"]
    assert 4 <= len(steps) < 20


def test_a_forked_child_does_not_write_the_lines_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = TraceWriter(str(path))
    trace.write(1, "a", 16, 1)
    child = multiprocessing.get_context("fork").Process(target=trace.close)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    trace.close()
    assert len(records(path)) == 1
