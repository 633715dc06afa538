# SPDX-License-Identifier: Apache-2.0
"""The opt-in trace: what every scheduled request held, step by step, as JSON lines.

    {"time": 1735689600.25, "step": 7, "request": "cmpl-1", "computed_tokens": 512,
     "held_blocks": 18, "hit_tokens": 384}

For looking at what the budget does (`RocoConfig.trace`), not for production: it costs
a line per request and step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
import weakref
from io import FileIO
from pathlib import Path

_WRITE = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY


def check_path(path: str) -> None:
    """Raise early, before an engine is started, and leave the file system as it is.

    Whether another engine writes the file is not asked: a front end of this engine may
    be checking it while the engine already runs.

    Args:
        path: The option `trace`.

    Raises:
        ValueError: The file cannot be written, or is none to write a trace to.
    """
    file = _expanded(path)
    try:
        try:
            os.close(_open(path, file, _WRITE))
        except FileNotFoundError:
            # a link may lead to where there is no file yet
            _check_directory(Path(os.path.realpath(file)).parent)
    except OSError as error:
        raise _unwritable(path, error.strerror) from error


class TraceWriter:
    """Writes one engine core's trace to a file that no other engine writes.

    Args:
        path: The option `trace`. `~` is expanded; the file is replaced if it exists.
        engine: Data-parallel index of the engine core. Engines other than the first
            write beside it: `trace.jsonl`, `trace.dp1.jsonl`, `trace.dp2.jsonl`.

    Raises:
        ValueError: The file cannot be written, or is none to write a trace to.
    """

    def __init__(self, path: str, engine: int = 0) -> None:
        self.path = _expanded(path)
        if engine:
            self.path = self.path.with_name(
                f"{self.path.stem}.dp{engine}{self.path.suffix}"
            )
        try:
            descriptor = _open(path, self.path, _WRITE | os.O_CREAT)
            with contextlib.ExitStack() as on_error:
                self._file = on_error.enter_context(FileIO(descriptor, "w"))
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    _lock(path, descriptor)
                    os.ftruncate(descriptor, 0)
                on_error.pop_all()
        except OSError as error:
            raise _unwritable(path, error.strerror) from error
        self._lines: list[str] = []
        self._finalizer = weakref.finalize(
            self, _close, self._file, self._lines, os.getpid()
        )

    def write(
        self,
        step: int,
        request_id: str,
        num_computed_tokens: int,
        held_blocks: int,
        hit_tokens: int | None = None,
    ) -> None:
        """Add one line; it is in the file after `flush`.

        Args:
            step: The scheduler's step, counted from the start of the engine.
            request_id: The request, by vLLM's name for it.
            num_computed_tokens: Tokens of the request that are computed.
            held_blocks: Blocks that the block manager holds for it.
            hit_tokens: Length of the prefix that it begins behind, None unless this
                step lets it in.
        """
        record = {
            "time": round(time.time(), 6),
            "step": step,
            "request": request_id,
            "computed_tokens": num_computed_tokens,
            "held_blocks": held_blocks,
        }
        if hit_tokens is not None:
            record["hit_tokens"] = hit_tokens
        self._lines.append(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Show the step's lines to readers; call it once per step.

        Raises:
            OSError: The lines cannot be written, or nobody could read them.
            ValueError: The trace is closed.
        """
        _write(self._file, self._lines)

    def close(self) -> None:
        """Flush and close. Closing twice is harmless.

        Raises:
            OSError: See `flush`.
        """
        self._finalizer()


def _write(file: FileIO, lines: list[str]) -> None:
    content = memoryview("".join(lines).encode())
    lines.clear()
    before = os.fstat(file.fileno())
    if not before.st_nlink:
        raise FileNotFoundError(errno.ENOENT, "somebody has removed its file")
    try:
        while content:
            content = content[file.write(content) or 0 :]
    except OSError:
        # whole lines, or none
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), before.st_size)
        raise


def _close(file: FileIO, lines: list[str], owner_pid: int) -> None:
    try:
        # a forked child inherits the lines, but they are not its to write
        if lines and os.getpid() == owner_pid:
            _write(file, lines)
    finally:
        file.close()


def _expanded(path: str) -> Path:
    if "\0" in path:
        raise _unwritable(path, "no path has a null character")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise _unwritable(path, "there is no such home directory") from error


def _check_directory(directory: Path) -> None:
    """Raise an OSError if no file can be made in a directory."""
    if not stat.S_ISDIR(os.stat(directory).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _open(path: str, file: Path, flags: int) -> int:
    """Open a file that a step can write to without waiting for anybody.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is of another kind.
    """
    with contextlib.suppress(FileNotFoundError):
        _check_kind(path, os.stat(file))
    descriptor = os.open(file, flags, 0o666)
    try:
        # what is open now need not be what was looked at
        _check_kind(path, os.fstat(descriptor))
        if os.isatty(descriptor):
            raise _unwritable(path, "it is a terminal, which may stop for its user")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_kind(path: str, status: os.stat_result) -> None:
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        raise _unwritable(path, "it is a pipe, whose reader the engine would wait for")
    if stat.S_ISBLK(mode):
        raise _unwritable(path, "it is a disk")
    if stat.S_ISREG(mode) and any(
        os.path.samestat(status, output) for output in _outputs()
    ):
        raise _unwritable(path, "the output of vLLM goes there")


def _outputs() -> list[os.stat_result]:
    outputs = []
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            outputs.append(os.fstat(descriptor))
    return outputs


def _lock(path: str, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _unwritable(
            path, "another engine is writing its trace there, or has not ended yet"
        ) from error
    # some network file systems have no locks
    except OSError:
        pass


def _unwritable(path: str, reason: str | None) -> ValueError:
    where = os.path.abspath(os.path.expanduser(path))
    return ValueError(
        f"roco: trace = {path!r} cannot be written: {reason} ({where}). Use a file in "
        "an existing directory that this user may write, one for each server, or leave "
        "trace out."
    )
