# SPDX-License-Identifier: Apache-2.0
"""Processes from a nursery are what those of `subprocess` and of `spawn` are."""

from __future__ import annotations

import functools
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

from tests import fresh_python
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


@pytest.mark.parametrize("fails", ["the message", "the fork"])
def test_a_copy_that_fails_does_not_go_on_as_its_owner(fails: str) -> None:
    """It did: a second server started silently beside the first one."""
    code = """
import os, sys
from tests.quick_start import nursery

real_fork, forks = os.fork, []

def fork():
    forks.append(1)
    if len(forks) > 1 and sys.argv[1] == "the fork":
        raise OSError("no more processes")
    return real_fork()

os.fork = fork
own = nursery.branch_off()
if sys.argv[1] == "the message":
    own._connection.sendall((3).to_bytes(8, "big") + b"no!")
print("the owner goes on", flush=True)
try:
    own.start(["-c", "print('never')"])
except OSError as error:
    print("told:", error)
"""
    process = run_fresh(code, fails, folder=Path.cwd())
    assert process.returncode == 0
    assert process.stdout.splitlines()[0] == "the owner goes on"
    assert len(process.stdout.splitlines()) == 2
    assert process.stdout.splitlines()[1].startswith("told:")
    # and why
    reason = "no more processes" if fails == "the fork" else "JSONDecodeError"
    assert reason in process.stderr


def test_who_asks_for_more_than_a_nursery_knows_is_executed() -> None:
    code = "import os; print(os.getsid(0) == os.getpid())"
    for options, expected in (({"start_new_session": True}, "True"), ({}, "False")):
        with FreshPython(
            ["-c", code], stdout=subprocess.PIPE, text=True, **options
        ) as process:
            assert process.communicate()[0].strip() == expected


def test_a_nursery_that_is_gone_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    # others go on with theirs, and those of this test have nothing to import
    nursery = functools.cache(lambda: opened([]))
    monkeypatch.setattr(fresh_python, "nursery", nursery)
    assert run_fresh("print(1)").stdout == "1\n"
    first = nursery()
    assert first._process is not None
    first._process.kill()
    first._process.wait()
    assert run_fresh("print(2)").stdout == "2\n"
    assert run_fresh("print(3)").stdout == "3\n"
    second = nursery()
    assert second is not first
    assert second._process is not None
    second._process.kill()
    second._process.wait()


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
