# SPDX-License-Identifier: Apache-2.0
"""Pythons in which nothing of vLLM has happened yet, and little is left to import."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.quick_start.nursery import Nursery, is_possible, opened

TIME_LIMIT = 300
"""Seconds."""


@functools.cache
def nursery() -> Nursery:
    """Return the nursery of this process."""
    return opened()


_EXECUTE_CHILD = inspect.signature(subprocess.Popen._execute_child)
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


class FreshPython(subprocess.Popen[str]):
    """Runs what `sys.executable` would run, from this process's nursery.

    `Popen`'s arguments for standard streams and text are heeded, `cwd` and `env`.
    """

    def _execute_child(self, args: list[str | Path], *rest: Any) -> None:
        asked = _EXECUTE_CHILD.bind(self, args, *rest).arguments
        if not (is_possible() and self._is_forked(asked)):
            super()._execute_child([sys.executable, *args], *rest)

    def _is_forked(self, asked: Mapping[str, Any]) -> bool:
        """Have it forked, and return whether that was possible.

        Args:
            asked: The arguments of `Popen._execute_child`, by name.
        """
        if any(asked[name] for name in ("preexec_fn", "pass_fds", "start_new_session")):
            # of those a nursery knows nothing
            return False
        streams = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        try:
            self.pid = nursery().start(
                [os.fspath(argument) for argument in asked["args"]],
                environment=asked["env"],
                folder=asked["cwd"],
                files={n: file for n, file in enumerate(streams) if file != -1},
            )
        except OSError:
            # it is gone; the next one asks another
            nursery.cache_clear()
            return False
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in _PIPES))
        return True


def run_python(
    arguments: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    stderr: int = subprocess.PIPE,
    timeout: float | None = TIME_LIMIT,
) -> subprocess.CompletedProcess[str]:
    """Run what `sys.executable` would run, to its end.

    Args:
        arguments: Of the interpreter: `-c` and code, `-m` and a module's name, or a
            script, and more behind it.
        environment: All variables that it sees; `PYTHONPATH` goes before other places.
            None for those of the caller.
        folder: The current folder; None for that of the caller.
        stderr: Where that goes.
        timeout: Seconds after which it is killed, and `TimeoutExpired` raised.

    Returns:
        Its exit status and what it wrote.
    """
    with FreshPython(
        arguments,
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@contextlib.contextmanager
def forking(module: ModuleType) -> Iterator[None]:
    """Let the Pythons that a module runs come from this process's nursery."""

    def run(
        command: Sequence[str], *, cwd: Path, env: Mapping[str, str], **_: Any
    ) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable
        return run_python(command[1:], folder=cwd, environment=env)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "subprocess", SimpleNamespace(run=run))
        yield


def run_fresh(
    code: str, *arguments: str, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c` does; `options` are those of `run_python`."""
    return run_python(["-c", code, *arguments], **options)
