# SPDX-License-Identifier: Apache-2.0
"""Processes from a nursery are what those of `subprocess` and of `spawn` are."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing import util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fresh_python import FreshPython, run_fresh, run_python
from tests.quick_start.nursery import is_possible, opened, serve_spawn

pytestmark = pytest.mark.skipif(not is_possible(), reason="processes are executed here")

SPAWN = multiprocessing.get_context("spawn")
WHAT_IT_IS = """
import json, os, sys
print(json.dumps({
    "arguments": sys.argv,
    "folder": os.getcwd(),
    "variables": sorted(os.environ),
    "parent": os.getppid(),
    "modules": sorted({"torch", "vllm", "vllm_roco", "pytest"} & sys.modules.keys()),
    "name": __name__,
    "file": globals().get("__file__"),
}))
"""
REMEMBERED: list[str] = []


def what_it_is(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert (process.returncode, process.stderr) == (0, "")
    found: dict[str, Any] = json.loads(process.stdout)
    return found


def test_code_sees_what_it_is_given_alone(tmp_path: Path) -> None:
    process = run_fresh(WHAT_IT_IS, "a", environment={"ONLY": "1"}, folder=tmp_path)
    assert what_it_is(process) == {
        "arguments": ["-c", "a"],
        "folder": str(tmp_path),
        "variables": ["ONLY"],
        "parent": os.getpid(),
        "modules": ["torch"],
        "name": "__main__",
        "file": None,
    }


def test_scripts_and_modules_run_too(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(WHAT_IT_IS)
    for arguments in ([script, "a"], ["-m", "program", "a"]):
        found = what_it_is(run_python(arguments, folder=tmp_path))
        assert found["arguments"] == [str(script), "a"]
        assert (found["name"], found["file"]) == ("__main__", str(script))


def test_places_of_modules_are_pythons(tmp_path: Path) -> None:
    (tmp_path / "hidden.py").touch()
    code = "import hidden"
    assert run_fresh(code, folder=tmp_path).returncode == 0
    process = run_python(["-P", "-c", code], folder=tmp_path)
    assert "No module named 'hidden'" in process.stderr


@pytest.mark.parametrize(
    ("code", "status", "says"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("raise ValueError('bad')", 1, "ValueError: bad\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        (
            "import atexit, sys; atexit.register(print, 'end', file=sys.stderr)",
            0,
            "end",
        ),
    ],
)
def test_ends_are_told(code: str, status: int, says: str) -> None:
    process = run_fresh(code)
    assert process.returncode == status
    assert says in process.stderr


def test_a_signal_ends_it_and_what_is_idle_with_it() -> None:
    code = "import time; print('here', flush=True); time.sleep(100)"
    with FreshPython(["-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
    assert process.returncode == -signal.SIGTERM
    _, alive = psutil.wait_procs(below, timeout=10)
    assert alive == []


def tell(connection: Connection, depth: int) -> None:
    """Tell what is here, and below; end with a status that tells the depth."""
    told = [(os.getpid(), os.getppid(), len(REMEMBERED), "torch" in sys.modules)]
    if depth:
        here, there = SPAWN.Pipe()
        child = SPAWN.Process(target=tell, args=(there, depth - 1))
        child.start()
        told += here.recv()
        child.join()
        assert child.exitcode == depth - 1
    connection.send(told)
    sys.exit(depth)


def test_spawned_processes_are_children_that_know_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REMEMBERED", ["of the owner"])
    here, there = SPAWN.Pipe()
    child = SPAWN.Process(target=tell, args=(there, 1))
    child.start()
    (first, of_first, *knows), (_, of_second, *knows_too) = here.recv()
    child.join()
    assert child.exitcode == 1
    assert (of_first, of_second) == (os.getpid(), first)
    assert knows == knows_too == [0, True]


def test_files_of_the_owner_are_not_there(tmp_path: Path) -> None:
    # its number is not one that the process would use itself
    with (tmp_path / "file").open("w") as file:
        os.dup2(file.fileno(), 200, inheritable=True)
    try:
        process = run_fresh("import os; os.fstat(200)")
    finally:
        os.close(200)
    assert "Bad file descriptor" in process.stderr


def test_spawn_goes_on_without_its_nursery(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a signal to a whole process group."""
    another = opened()
    assert another._process is not None
    another._process.kill()
    another._process.wait()
    # put back at the end
    monkeypatch.setattr(util, "spawnv_passfds", util.spawnv_passfds)
    serve_spawn(lambda: another)
    child = SPAWN.Process(target=sys.exit, args=(5,))
    child.start()
    child.join()
    assert child.exitcode == 5
