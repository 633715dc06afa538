# SPDX-License-Identifier: Apache-2.0
"""Whose numbers a file holds, told by its name: nobody opens a stranger's file.

A process number is no identity, for containers may share a directory, and each of them
has a process 1. So a process is named by its number and by the random key that Python
gives to a program when it starts, and hands down to every process that the program
starts through `multiprocessing`, spawned or forked. The names hold digests.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

_DIGITS = 16


@dataclass(frozen=True)
class FileName:
    """The name of a file of numbers.

    prometheus_client reads the kind of the numbers from what precedes `roco`.

    Attributes:
        kind: `counter`, `gauge_max` or `histogram`.
        process: The engine core's process.
        parent: The process that started it: the front end, if that is another one.
        instance: The vLLM instance.
        engine: Data-parallel index of the engine core.
        core: Random, the same in all files of one engine core.
        writer: `core`, or a random name of a worker's.
    """

    kind: str
    process: str
    parent: str
    instance: str
    engine: int
    core: str
    writer: str = "core"

    @classmethod
    def of_this_core(cls, kind: str, instance_id: str, engine: int) -> FileName:
        """Return a new name for an engine core that is this process.

        Args:
            kind: See `FileName`.
            instance_id: `VllmConfig.instance_id`.
            engine: See `FileName`.
        """
        parent = multiprocessing.parent_process()
        parent_pid = None if parent is None else parent.pid
        return cls(
            kind=kind,
            process=process_name(os.getpid()),
            parent=process_name(parent_pid or os.getpid()),
            instance=instance_name(instance_id),
            engine=engine,
            core=secrets.token_hex(_DIGITS // 2),
        )

    @classmethod
    def parse(cls, name: str) -> FileName | None:
        """Return what a name tells, None if it is not of such a file."""
        match = _PATTERN.fullmatch(name)
        if match is None:
            return None
        parts: dict[str, Any] = match.groupdict()
        return cls(**parts | {"engine": int(parts["engine"])})

    def of_a_worker(self) -> FileName:
        """Return a new name for a file that a worker of this engine core adds."""
        return replace(self, writer=secrets.token_hex(_DIGITS // 2))

    @override
    def __str__(self) -> str:
        return (
            f"{self.kind}_roco-{self.process}-{self.parent}-{self.instance}-"
            f"{self.engine}-{self.core}-{self.writer}.db"
        )


_DIGEST = f"[0-9a-f]{{{_DIGITS}}}"
_PATTERN = re.compile(
    rf"(?P<kind>counter|gauge_max|histogram)_roco-"
    rf"(?P<process>{_DIGEST})-(?P<parent>{_DIGEST})-"
    rf"(?P<instance>{_DIGEST})-(?P<engine>\d+)-(?P<core>{_DIGEST})-"
    rf"(?P<writer>core|{_DIGEST})\.db"
)


def process_name(pid: int) -> str:
    """Return the name of a process of this program."""
    key = bytes(multiprocessing.current_process().authkey)
    return _digest(key + b"%d" % pid)


def instance_name(instance_id: str) -> str:
    """Return the name of a vLLM instance."""
    return _digest(instance_id.encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]
