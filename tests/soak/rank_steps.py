# SPDX-License-Identifier: Apache-2.0
"""What a rank does in a step, as a line of its file has it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Eviction:
    """One request's, at the end of a step.

    Attributes:
        request: Its id.
        num_tokens: Its length then.
        evicted: Blocks that it had given up before the step, and has behind it.
        alike: Whether what is kept depends on nobody's heads or layers.
        kept: Position of the first token of every block that lives on, in the order of
            the table.
        queries: Queries that have seen each of them.
    """

    request: str
    num_tokens: int
    evicted: tuple[int, int]
    alike: bool
    kept: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)


@dataclass
class Step:
    """What a rank did in a step.

    Attributes:
        number: How many there were before.
        requests: Who had tokens in it, in the order of the batch.
        tables: Sum of the blocks that they stand in.
        evictions: In the order of the batch.
        faults: What this rank finds wrong by itself.
    """

    number: int
    requests: list[str] = field(default_factory=list)
    tables: int = 0
    evictions: list[Eviction] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def rank_file(audit: Path, rank: int) -> Path:
    """Return the file of a rank, beside that of the scheduler."""
    return audit.with_name(f"rank-{rank}.jsonl")


def from_json(line: str | bytes) -> Step:
    """Return the step of a line."""
    values = json.loads(line)
    evictions = [
        Eviction(**{**one, "evicted": tuple(one["evicted"])})
        for one in values.pop("evictions")
    ]
    return Step(**values, evictions=evictions)
