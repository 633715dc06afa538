# SPDX-License-Identifier: Apache-2.0
"""The memory-mapped file in which an engine leaves its numbers for the front end.

A file belongs to one engine core, which holds an exclusive `flock` on it. The kernel
drops that lock when the owner dies, however it dies: a file that can be locked is a
leftover, never read, and swept when the next engine starts.

    byte 0         8         16        24        32 ................ end
         | freed   | max     | peak    | moved   | JSON: who publishes |

The numbers are native unsigned 64-bit integers, each with one writer (the engine core;
of `moved` a worker), each written and read with one aligned store or load, so a reader
never sees half a value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import mmap
import multiprocessing
import os
import stat
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FREED, MAX, PEAK, MOVED = range(4)
"""Places of the numbers."""

_NUM_VALUES = 4
_HEADER_BYTES = 8 * _NUM_VALUES

# names the layout above: another release of this package may share the directory
_SUFFIX = ".metrics2"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whose numbers a file holds.

    Attributes:
        instance_id: `VllmConfig.instance_id`, the same in all processes of an engine.
        frontend_pid: The process that started the engine core.
        engine: Data-parallel index of the engine core.
        model_name: Served name of the model.
        budget_tokens: The option `budget`.
    """

    instance_id: str
    frontend_pid: int
    engine: int
    model_name: str
    budget_tokens: int


class MetricsFile:
    """The engine core's own file, which exists as long as this object and its process.

    Args:
        identity: Whose numbers these are.

    Attributes:
        values: The numbers, by their places; all 0 at first.

    Raises:
        PermissionError: The directory of the files is not this user's alone.
        OSError: The file cannot be written.
    """

    def __init__(self, identity: Identity) -> None:
        path, descriptor, mapping = _create_file(identity)
        self.values = _values_of(mapping)
        self._finalizer = weakref.finalize(
            self, _remove_file, path, descriptor, os.getpid()
        )

    def close(self) -> None:
        """Remove the file. Closing twice is harmless."""
        self._finalizer()


def check_directory() -> None:
    """Raise early, before an engine is started.

    Raises:
        PermissionError: There is a directory of the files, and it is not this user's
            alone.
    """
    directory = _directory()
    with contextlib.suppress(FileNotFoundError):
        if not _is_private(directory):
            raise PermissionError(
                f"roco: {directory} must be a directory that belongs to user "
                f"{os.geteuid()} with mode 0700, to hold the metrics of running "
                "engines. Remove it, or set TMPDIR to a directory of your own."
            )


def frontend_pid() -> int:
    """Return the process that reads what this engine core publishes."""
    # an engine core is a child of the front end, or the front end itself
    parent = multiprocessing.parent_process()
    pid = os.getpid() if parent is None else parent.pid
    assert pid is not None
    return pid


def read_files() -> Iterator[tuple[Identity, tuple[int, ...]]]:
    """Yield the numbers of every engine core of this user that lives."""
    for descriptor in _live_files(os.O_RDONLY):
        mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        yield _identity_of(mapping), tuple(_values_of(mapping))


def find_values(instance_id: str, engine: int) -> memoryview | None:
    """Return the numbers of one engine core for another process to write.

    Args:
        instance_id: See `Identity`.
        engine: Likewise.

    Returns:
        The numbers by their places, or None while that engine core has no file.
    """
    for descriptor in _live_files(os.O_RDWR):
        mapping = mmap.mmap(descriptor, 0)
        identity = _identity_of(mapping)
        if (identity.instance_id, identity.engine) == (instance_id, engine):
            return _values_of(mapping)
    return None


def _values_of(mapping: mmap.mmap) -> memoryview:
    return memoryview(mapping)[:_HEADER_BYTES].cast("Q")


def _identity_of(mapping: mmap.mmap) -> Identity:
    return Identity(**json.loads(mapping[_HEADER_BYTES:]))


def _directory() -> Path:
    return Path(tempfile.gettempdir()) / f"vllm_roco-{os.geteuid()}"


def _is_private(directory: Path) -> bool:
    # lstat: a symbolic link may be another user's
    status = directory.lstat()
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & 0o077
    )


def _create_file(identity: Identity) -> tuple[Path, int, mmap.mmap]:
    """Create this engine's file, locked, and sweep what dead engines left."""
    directory = _directory()
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    check_directory()
    content = bytes(_HEADER_BYTES) + json.dumps(dataclasses.asdict(identity)).encode()
    with _locked(directory):
        _sweep(directory)
        descriptor, name = tempfile.mkstemp(
            dir=directory, prefix=f"{os.getpid()}-{identity.engine}-"
        )
        os.write(descriptor, content)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # only now may readers find it
        path = Path(name).with_suffix(_SUFFIX)
        os.rename(name, path)
    return path, descriptor, mmap.mmap(descriptor, len(content))


def _remove_file(path: Path, descriptor: int, owner_pid: int) -> None:
    # a forked child inherits the publisher, but not the file
    if os.getpid() == owner_pid:
        path.unlink(missing_ok=True)
    os.close(descriptor)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other engines from sweeping a file that is not locked yet."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(directory: Path) -> None:
    for path in directory.iterdir():
        if not path.is_file():
            continue
        descriptor = _open(path)
        if descriptor is None:
            continue
        if not _is_alive(descriptor):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _open(path: Path, flags: int = os.O_RDONLY) -> int | None:
    # the owner may remove its file at any time
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        return None


def _is_alive(descriptor: int) -> bool:
    # shared, so that two readers do not take each other for the owner
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _live_files(flags: int) -> Iterator[int]:
    """Open every file that has an owner, one after another."""
    directory = _directory()
    try:
        if not _is_private(directory):
            return
    except FileNotFoundError:
        return
    for path in directory.glob(f"*{_SUFFIX}"):
        descriptor = _open(path, flags)
        if descriptor is None:
            continue
        try:
            if _is_alive(descriptor):
                yield descriptor
        finally:
            os.close(descriptor)
