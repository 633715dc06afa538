# SPDX-License-Identifier: Apache-2.0
"""Requests that may share prefixes, and runs of them, in whichever way they arrive."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.serving.engines import Engine

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class RequestShape:
    """Requests of a kind.

    Attributes:
        about: What it shows.
        num_requests: Asked together, or at one rate.
        prefix_len: Tokens at a prompt's beginning that requests share.
        num_prefixes: Different ones.
        output_len: Tokens to write.
        model: Folder of `benchmarks/models`.
    """

    about: str
    num_requests: int
    output_len: int
    prefix_len: int = 0
    num_prefixes: int = 0
    model: str = "qwen2.5-7b"

    def named(self, *names: str) -> dict[str, object]:
        """Return some of the attributes as columns of a row."""
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class SideRun:
    """Requests of a kind and the engine that serves them in a round.

    Attributes:
        name: Of the requests.
        side: Of the comparison.
        engine: What serves them.
        number: Of the round, from 1.
    """

    name: str
    side: str
    engine: Engine
    number: int


def grouped(runs: Iterable[R], key: Callable[[R], Hashable]) -> list[list[R]]:
    """Return runs of one key together, in the order of each key's first one."""
    groups: dict[Hashable, list[R]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())
