# SPDX-License-Identifier: Apache-2.0
"""Where the files of numbers lie.

Where several API servers run, vLLM has made a directory whose counters all of them
show. Elsewhere it is a directory of this user's alone: in the temporary directory, or,
if somebody else was there first, in the user's cache. The processes of an engine agree
on these without a word between them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MULTIPROCESS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(frozen=True)
class Place:
    """A directory for files of numbers.

    Attributes:
        path: The directory.
        is_private: Whether it must belong to this user alone; if not, it is vLLM's.
    """

    path: Path
    is_private: bool

    def is_usable(self) -> bool:
        """Return whether the directory is there, and nobody else controls it."""
        try:
            # a symbolic link may be another user's
            status = self.path.lstat() if self.is_private else self.path.stat()
        except OSError:
            return False
        if not self.is_private:
            return stat.S_ISDIR(status.st_mode)
        return (
            stat.S_ISDIR(status.st_mode)
            and status.st_uid == os.geteuid()
            and not status.st_mode & 0o077
        )

    def prepare(self) -> None:
        """Make the directory if it is this user's to make.

        Raises:
            OSError: It cannot be used.
        """
        if self.is_private:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700, parents=True)
        if not self.is_usable():
            wanted = f"of user {os.geteuid()} with mode 0700, or not there"
            raise PermissionError(
                f"{self.path} must be a directory "
                f"{wanted if self.is_private else 'that vLLM has made'}"
            )


def places() -> Iterator[Place]:
    """Yield where files may lie, the best place first."""
    if shared := os.environ.get(MULTIPROCESS_DIRECTORY):
        yield Place(Path(shared), is_private=False)
    # not tempfile.gettempdir(): its answer depends on which disk is full just now
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")
    yield Place(temporary / f"vllm_roco-{os.geteuid()}", is_private=True)
    # a user may have no home
    with contextlib.suppress(RuntimeError):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        yield Place(Path(cache) / f"vllm_roco-{os.geteuid()}", is_private=True)


def times_of_change(directories: Iterable[Path]) -> list[int]:
    """Return when files have last come or gone, in nanoseconds; 0 without a directory.

    Two changes at one tick of the system's clock have one time.
    """
    times = []
    for directory in directories:
        try:
            times.append(os.stat(directory).st_mtime_ns)
        except OSError:
            times.append(0)
    return times
