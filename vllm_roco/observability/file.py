# SPDX-License-Identifier: Apache-2.0
"""A file of numbers, in the format in which prometheus_client's processes share theirs.

A file belongs to one process, which alone writes it, each number with one store, and
holds an exclusive `flock` on it. The kernel drops that lock when the owner dies,
however it dies: a file that can be locked is a leftover, never read here, and swept
when the next engine starts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from prometheus_client.mmap_dict import MmapedDict

from vllm_roco.observability.families import bucket_name
from vllm_roco.observability.file_names import FileName
from vllm_roco.observability.places import Place, places

_ENTRY_BYTES = 28
"""Of a number beside its key, at most: length, padding, number and time."""

_MOST_TRIES = 100


class Number(NamedTuple):
    """One number of a file.

    Attributes:
        sample_name: What it is called, of a histogram's bucket with `bucket_name`.
        model_name: Served name of the model.
        engine: Data-parallel index of the engine core.
        value: The number.
    """

    sample_name: str
    model_name: str
    engine: int
    value: int


class NumbersFile:
    """A file that this process writes. It exists as long as this object does.

    Not thread-safe: one thread writes.

    Args:
        place: Where it lies.
        name: Whose numbers it holds.
        numbers: By prometheus_client's keys; no others can be set later.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(
        self, place: Place, name: FileName, numbers: Mapping[str, float]
    ) -> None:
        self._place = place
        self._path = place.path / str(name)
        self._numbers = dict(numbers)
        self._create()

    def set(self, key: str, number: float) -> None:
        """Show another number."""
        self._numbers[key] = number
        self._values[self._places[key]] = number

    def keep(self) -> None:
        """Write the file anew if somebody has removed it; call it now and then.

        Raises:
            OSError: The file cannot be written.
        """
        try:
            there = os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            there = False
        if not there:
            self.close()
            self._create()

    def close(self) -> None:
        """Remove the file. Closing twice is harmless."""
        self._finalizer()

    def _create(self) -> None:
        self._place.prepare()
        if not any(self._try_to_create() for _ in range(_MOST_TRIES)):
            raise OSError(errno.EBUSY, "others lock the new file", str(self._path))

    def _try_to_create(self) -> bool:
        """Create the file, or return False if a sweep was faster."""
        descriptor, temporary = tempfile.mkstemp(
            dir=self._place.path, prefix=f"{self._path.name}."
        )
        try:
            _allocate(descriptor, self._numbers)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(descriptor).st_nlink:
                os.close(descriptor)
                return False
            self._places = _write_numbers(temporary, self._numbers)
            self._values = memoryview(mmap.mmap(descriptor, 0)).cast("d")
            # only now may readers find it
            os.rename(temporary, self._path)
        except BlockingIOError:
            _remove(Path(temporary), descriptor)
            return False
        except BaseException:
            _remove(Path(temporary), descriptor)
            raise
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(
            self, _close, self._path, descriptor, os.getpid()
        )
        return True


def _allocate(descriptor: int, numbers: Mapping[str, float]) -> None:
    """Fill the file: a store into a hole of it would be fatal on a full disk."""
    size = sum(len(key.encode()) + _ENTRY_BYTES for key in numbers) + 8
    size += -size % mmap.PAGESIZE
    if os.write(descriptor, bytes(size)) != size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_numbers(path: str, numbers: Mapping[str, float]) -> dict[str, int]:
    """Write numbers, and return the index of each among the file's words of 8 bytes.

    prometheus_client only lays the file out. Its way to change a number, 16 bytes of
    number and time, costs a microsecond; a store costs a tenth of that.
    """
    layout = MmapedDict(path)
    for key, number in numbers.items():
        layout.write_value(key, number, 0.0)
    layout.close()
    written = MmapedDict.read_all_values_from_file(path)
    # the keys themselves, and no copies: they are found faster
    return {
        key: position // 8 for key, (*_, position) in zip(numbers, written, strict=True)
    }


def _close(path: Path, descriptor: int, owner_pid: int) -> None:
    # a forked child inherits the object, but not the file
    if os.getpid() == owner_pid:
        _remove(path, descriptor)
    else:
        os.close(descriptor)


def _remove(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(descriptor)


def find_files() -> Iterator[tuple[Place, FileName]]:
    """Yield the files of numbers in all places that can be trusted."""
    for place in places():
        if not place.is_usable():
            continue
        for name in _names_in(place):
            if (parsed := FileName.parse(name)) is not None:
                yield place, parsed


def read_file(place: Place, name: FileName) -> list[Number]:
    """Return the numbers of a file; none if it has no owner, or cannot be read."""
    path = place.path / str(name)
    try:
        if not _has_owner(path):
            return []
        return [
            _number(key, value)
            for key, value, _, _ in MmapedDict.read_all_values_from_file(path)
        ]
    # removed just now, cut short, or damaged in a way that nobody foresaw: whatever
    # is in a file, who asks for the numbers gets the others
    except Exception:
        return []


def sweep(place: Place) -> None:
    """Remove what dead processes left in a place."""
    for name in _names_in(place):
        # one that is being made has a suffix
        if FileName.parse(name.partition(".db")[0] + ".db") is not None:
            with contextlib.suppress(OSError):
                _has_owner(place.path / name, remove_if_not=True)


def _names_in(place: Place) -> list[str]:
    try:
        return os.listdir(place.path)
    except OSError:
        return []


def _has_owner(path: Path, *, remove_if_not: bool = False) -> bool:
    """Return whether the process that writes a file lives.

    Args:
        path: The file.
        remove_if_not: Whether to remove one whose process is dead.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        # shared, so that two readers do not take each other for the owner
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        if remove_if_not:
            # still locked: an owner that wants it now makes another one
            path.unlink()
        return False
    finally:
        os.close(descriptor)


def _number(key: str, value: float) -> Number:
    _, sample_name, labels, _ = json.loads(key)
    if (bound := labels.get("le")) is not None:
        sample_name = bucket_name(sample_name, bound)
    return Number(sample_name, labels["model_name"], int(labels["engine"]), int(value))
