# SPDX-License-Identifier: Apache-2.0
"""`demo.sh` as its user meets it: as a command, with its output and what it leaves."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tools.demo.errors import DemoError
from tools.demo.measured import find_sequence, read_trace
from tools.demo.options import port_trouble

DEMO = Path(__file__).parents[2] / "demo.sh"
HOST = "127.0.0.1"

BUDGET, STRIDE, CHUNK, BLOCK_SIZE = 192, 64, 64, 16
PROMPT_TOKENS, GENERATIONS, TOKENS = 512, 2, 192
SMALL = [
    *("--budget", str(BUDGET)),
    *("--stride", str(STRIDE)),
    *("--chunk", str(CHUNK)),
    *("--prompt-tokens", str(PROMPT_TOKENS)),
    *("--generations", str(GENERATIONS)),
    *("--tokens", str(TOKENS)),
]

ROW = re.compile(
    r"^ +(?P<name>passkey|generation \d) +(?P<read>\S+) +(?P<written>\S+)"
    r" +(?P<held>\S+) +(?P<full>\S+) +\d+% +(?P<freed>\S+) +(?P<answer>\S+)"
    r" +(?P<speed>\S+)",
    re.MULTILINE,
)
FOOTER = re.compile(
    r"^ +all, by /metrics +(?P<held>\S+) +(?P<freed>\S+) *$", re.MULTILINE
)


@pytest.fixture
def port() -> int:
    with socket.socket() as chosen:
        chosen.bind((HOST, 0))
        return int(chosen.getsockname()[1])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """This Python, and a folder of its own for temporary files."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return os.environ | {
        "ROCO_PYTHON": sys.executable,
        "TMPDIR": str(scratch),
        "COLUMNS": "160",
    }


def run_demo(
    arguments: Sequence[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DEMO, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_nothing_is_left(environment: dict[str, str], port: int) -> None:
    assert list(Path(environment["TMPDIR"]).iterdir()) == []
    assert port_trouble(port) is None


@pytest.mark.engine
@pytest.mark.usefixtures("engine_lock")
def test_table_and_picture(
    smollm2: Path, environment: dict[str, str], port: int, tmp_path: Path
) -> None:
    picture = tmp_path / "new" / "kv.png"

    done = run_demo(
        [*SMALL, "--model", str(smollm2), "--port", str(port)]
        + ["--picture", str(picture)],
        environment,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    rows = [match.groupdict() for match in ROW.finditer(done.stdout)]
    assert [row.pop("name") for row in rows] == [
        "passkey",
        *(f"generation {number + 1}" for number in range(GENERATIONS)),
    ]
    verdicts = [row.pop("answer") for row in rows]
    assert verdicts[0] in ("right", "wrong")
    assert set(verdicts[1:]) == {"-"}
    assert all(float(row.pop("speed").replace(",", "")) > 0 for row in rows)
    numbers = [
        {key: int(text.replace(",", "")) for key, text in row.items()} for row in rows
    ]
    for row in numbers:
        # the last token is written but not read again
        computed = row["read"] + row["written"] - 1
        assert 0 <= row["full"] - computed < 2 * BLOCK_SIZE
        assert BUDGET <= row["held"] <= BUDGET + STRIDE + CHUNK + BLOCK_SIZE
        assert row["freed"] > 0
        assert row["freed"] % (STRIDE // BLOCK_SIZE) == 0
    assert PROMPT_TOKENS - 30 < numbers[0]["read"] <= PROMPT_TOKENS
    assert [row["written"] for row in numbers[1:]] == [TOKENS] * GENERATIONS
    # what they give back, they give back while they write
    assert all(row["read"] <= BUDGET for row in numbers[1:])
    footer = FOOTER.search(done.stdout)
    assert footer is not None
    assert int(footer["held"]) == max(row["held"] for row in numbers)
    assert int(footer["freed"]) == sum(row["freed"] for row in numbers)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "vllm serve MODEL --attention-backend roco" in done.stdout
    assert_nothing_is_left(environment, port)


@pytest.mark.engine
@pytest.mark.usefixtures("engine_lock")
def test_interrupt_leaves_nothing(
    smollm2: Path, environment: dict[str, str], port: int
) -> None:
    arguments = [*SMALL, "--model", str(smollm2), "--port", str(port)]
    demo = subprocess.Popen(
        [DEMO, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what a terminal signals on Ctrl-C is the process group
        start_new_session=True,
    )
    try:
        assert demo.stdout is not None
        read = iter(demo.stdout.readline, "")
        assert any("[4/5] requests" in line for line in read)
        started = psutil.Process(demo.pid).children(recursive=True)
        assert len(started) > 1, "the server and its engine"

        os.killpg(demo.pid, signal.SIGINT)
        _, errors = demo.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)

    assert demo.returncode == 130
    assert errors.strip() == "stopped, and nothing is left running"
    _, alive = psutil.wait_procs(started, timeout=5)
    assert alive == []
    assert_nothing_is_left(environment, port)


@pytest.mark.engine
@pytest.mark.usefixtures("engine_lock")
def test_failing_server_shows_its_log(
    smollm2: Path, environment: dict[str, str], port: int, tmp_path: Path
) -> None:
    done = run_demo(
        [*SMALL, "--model", str(smollm2), "--port", str(port)]
        + ["--picture", str(tmp_path / "kv.png"), "--", "--max-model-len", "99999999"],
        environment,
    )

    log = tmp_path / "server.log"
    assert done.returncode == 1
    assert "max_model_len (99999999)" in log.read_text()
    assert "max_model_len (99999999)" in done.stdout
    assert done.stderr.startswith("error: the server ended by itself, with status 1.")
    assert str(log) in done.stderr
    assert_nothing_is_left(environment, port)


@contextlib.contextmanager
def listening(port: int) -> Iterator[None]:
    with socket.create_server((HOST, port)):
        yield


def test_busy_port_is_told_at_once(environment: dict[str, str], port: int) -> None:
    with listening(port):
        done = run_demo(["--port", str(port)], environment)

    assert done.returncode == 2
    assert (
        f"port {port} of {HOST} cannot be used: Address already in use. Choose another "
        "one with --port." in done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "500"], "budget = 500 is not a multiple of the block size (16"),
        (["--stride", "0"], "stride = 0 is not allowed"),
        (["--model", "./nowhere"], "--model ./nowhere is not the folder of a model"),
        (["--port", "0"], "'0' is not a port, 1 to 65535"),
        (["--tokens", "-1"], "'-1' is not a whole number above 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_argument_is_told_at_once(
    arguments: list[str], message: str, environment: dict[str, str], port: int
) -> None:
    done = run_demo(["--port", str(port), *arguments], environment)

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_python_is_named(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or pytest.fail(name))

    none = run_demo([], {"PATH": str(tmp_path)})
    wrong = run_demo([], os.environ | {"ROCO_PYTHON": "/no/python"})

    assert none.returncode == wrong.returncode == 1
    assert "found no Python 3.11 to 3.14" in none.stderr
    assert "ROCO_PYTHON=/no/python is not a program" in wrong.stderr


def test_help_needs_no_environment(tmp_path: Path) -> None:
    done = run_demo(["--help"], os.environ | {"ROCO_PYTHON": sys.executable})

    assert done.returncode == 0
    assert done.stderr == ""
    assert "--budget" in done.stdout
    assert "--enforce-eager" in done.stdout


def test_trace_is_read_by_request(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"time": 1.0, "step": 0, "request": "a-0", "computed_tokens": 17, '
        '"held_blocks": 2}\n'
        '{"time": 1.0, "step": 0, "request": "b-0", "computed_tokens": 16, '
        '"held_blocks": 1}\n'
        '{"time": 2.0, "step": 1, "request": "a-0", "computed_tokens": 33, '
        '"held_blocks": 1}\n'
    )

    sequences = read_trace(trace, block_size=16)

    first = find_sequence(sequences, "a")
    assert first.times == [1.0, 2.0]
    assert first.held_tokens == [32, 16]
    assert first.full_tokens == [32, 48]
    assert first.freed_blocks == 2
    assert find_sequence(sequences, "b").freed_blocks == 0
    with pytest.raises(DemoError, match="0 requests named c"):
        find_sequence(sequences, "c")
