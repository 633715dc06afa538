# SPDX-License-Identifier: Apache-2.0
"""Puts rows of `serving.csv` beside their baselines: same GPU, code, flags, work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Row = dict[str, str]

_WORK = (
    *("workload", "model", "gpu_memory_utilization", "kv_cache_bytes"),
    *("num_requests", "input_len", "output_len"),
)
_SAME = ("gpu", "vllm", "commit", "flags", *_WORK)


@dataclass(frozen=True)
class Comparison:
    """Engines that served the same requests with the same memory.

    Attributes:
        rows: By the engine's name, the baseline first.
    """

    rows: dict[str, Row]

    @property
    def baseline(self) -> Row:
        """Stock vLLM's row."""
        return next(iter(self.rows.values()))

    def ratio(self, name: str, column: str = "output_tok_s") -> float:
        """Return an engine's figure over the baseline's."""
        return float(self.rows[name][column]) / float(self.baseline[column])


def engine_name(row: Row) -> str:
    """Return what a reader calls the engine of a row."""
    if row["policy"] == "recent":
        return "roco, policy: recent"
    if row["policy"]:
        return "roco"
    if row["kv_cache_dtype"] == "auto":
        return row["backend"]
    return f"{row['backend']}, {row['kv_cache_dtype']} KV cache"


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """Return the newest comparison of every work, in the order of the rows.

    Rows are newer the later they stand; the newest of equal rows counts. Rows without a
    baseline of the same GPU, vLLM, commit and flags count for nothing.
    """
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        group = groups.setdefault(tuple(row[column] for column in _SAME), {})
        group[engine_name(row)] = row
    newest: dict[tuple[str, ...], Comparison] = {}
    for group in groups.values():
        stock = [name for name, row in group.items() if _is_baseline(row)]
        if not stock or len(group) == 1:
            continue
        ordered = {name: group[name] for name in sorted(group, key=_rank)}
        work = tuple(next(iter(ordered.values()))[column] for column in _WORK)
        newest[work] = Comparison(ordered)
    return list(newest.values())


def newest_settings(rows: Iterable[Row]) -> list[list[Row]]:
    """Return for every GPU, vLLM and flags the rows of the newest whole commit.

    That is one with stock vLLM's rows too, if there is any.
    """
    settings: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        settings.setdefault((row["gpu"], row["vllm"], row["flags"]), []).append(row)
    return [_newest(group) for group in settings.values()]


def _newest(rows: list[Row]) -> list[Row]:
    commits = dict.fromkeys(row["commit"] for row in reversed(rows))
    stock = {row["commit"] for row in rows if row["backend"] != "ROCO"}
    newest = next((name for name in commits if name in stock), rows[-1]["commit"])
    return [row for row in rows if row["commit"] == newest]


def _is_baseline(row: Row) -> bool:
    return not row["policy"] and row["kv_cache_dtype"] == "auto"


def _rank(name: str) -> int:
    """Stock vLLM first, then its other caches, then RoCo's bound and RoCo."""
    if not name.startswith("roco"):
        return 1 if "," in name else 0
    return 2 if "," in name else 3
