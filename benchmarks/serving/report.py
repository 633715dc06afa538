# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/performance.md and README.md, from the CSV files.

A page names each table between two comments, and `fill` puts it there, below its
picture if it has one::

    <!-- table: prefill -->
    <!-- end -->
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from benchmarks.serving.comparisons import (
    Comparison,
    Row,
    comparisons,
    newest_settings,
)
from benchmarks.serving.table import rows_of
from benchmarks.serving.workloads import WORKLOADS

_PLACE = re.compile(
    r"(?P<begin><!-- table: (?P<name>\S+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)
_MISSING = "Not measured yet.\n"
_FRONT_PAGE, _STRESS = "throughput", "r-kv-stress"
"""A small table for a front page, and the workload that it shows."""
_PICTURES = {
    "r-kv-stress": ("throughput", "Output tokens per second for each memory size"),
    "crossover": ("crossover", "Throughput over stock vLLM's for each length"),
    "prefill": ("prefill", "Time to first token for each chunk"),
    "memory": ("resident_tokens", "What a sequence holds for the tokens computed"),
    "decode_attention": ("decode_ratio", "FlashAttention 3's time over ours"),
}
"""Drawn by `plots` from the same rows."""


def tables(results: Path) -> dict[str, str]:
    """Return markdown by name; what has no rows is left out.

    Args:
        results: Folder of the CSV files.
    """
    found = serving(rows_of(results / "serving.csv"))
    for name, table in _OTHERS.items():
        if rows := rows_of(results / f"{name}.csv"):
            found[name] = table(rows)
    return found


def drawn(page: Path) -> set[str]:
    """Return the names of the pictures beside a page."""
    return {picture.stem for picture in (page.parent / "pictures").glob("*.svg")}


def fill(text: str, found: dict[str, str], pictures: Collection[str]) -> str:
    """Return a page with its tables replaced.

    Args:
        text: Markdown with places for tables.
        found: The tables by name.
        pictures: Names of the pictures that have been drawn.

    Raises:
        ValueError: The page names a table that there cannot be.
    """
    known = {_FRONT_PAGE, *WORKLOADS, *_OTHERS}

    def replaced(place: re.Match[str]) -> str:
        if place["name"] not in known:
            raise ValueError(
                f"no table is called {place['name']!r}; use one of "
                f"{', '.join(sorted(known))}"
            )
        name = place["name"]
        table = found.get(name, _MISSING)
        picture, title = _PICTURES.get(name, ("", ""))
        if name in found and picture in pictures:
            table = f"![{title}](pictures/{picture}.svg)\n\n{table}"
        return f"{place['begin']}\n{table}\n{place['end']}"

    return _PLACE.sub(replaced, text)


def serving(rows: list[Row]) -> dict[str, str]:
    """Return the table of each workload, and the one for a front page."""
    found: dict[str, list[Comparison]] = {}
    for comparison in comparisons(rows):
        found.setdefault(comparison.baseline["workload"], []).append(comparison)
    result = {}
    for workload, group in found.items():
        lines = [line for comparison in group for line in _serving_lines(comparison)]
        newest = [comparison.baseline for comparison in group]
        captions = dict.fromkeys(f"{row['model']}, {_code(row)}" for row in newest)
        result[workload] = _table("; ".join(captions), lines)
    if stress := found.get(_STRESS):
        result[_FRONT_PAGE] = _front_page(stress)
    return result


def _front_page(found: Sequence[Comparison]) -> str:
    """Return tokens per second of every engine, a line for each memory size."""
    names = max((list(comparison.rows) for comparison in found), key=len)
    lines = []
    for comparison in found:
        share = float(comparison.baseline["gpu_memory_utilization"])
        cells = [
            f"{_number(comparison.rows[name]['output_tok_s'], 0)} "
            f"({comparison.ratio(name):.2f})"
            if name in comparison.rows
            else ""
            for name in names
        ]
        lines.append([f"{100 * share:g} %", *cells])
    header = ["memory", *names]
    table = tabulate(lines, header, tablefmt="github", disable_numparse=True)
    return f"{table}\n"


def _serving_lines(comparison: Comparison) -> Iterator[dict[str, str]]:
    for name, row in comparison.rows.items():
        cache = row["kv_cache_bytes"]
        size = f"{int(cache) / 2**30:.2f} GiB KV" if cache else ""
        lengths = f"{row['input_len']} + {row['output_len']}"
        yield {
            "memory": size or row["gpu_memory_utilization"],
            "requests": f"{row['num_requests']} x ({lengths})",
            "engine": name,
            "tokens/s": _number(row["output_tok_s"], 0),
            "ratio": f"{comparison.ratio(name):.3f}",
            "TTFT ms": _number(row["ttft_ms"], 0),
            "TPOT ms": _number(row["tpot_ms"], 2),
            "running": row["max_running"],
            "preempted": row["preemptions"],
        }


def prefill(rows: list[Row]) -> str:
    """Return tables of the times to first token, each beside FLASH_ATTN's."""
    return "\n".join(map(_prefill, newest_settings(rows)))


def _prefill(rows: list[Row]) -> str:
    lines = []
    for (batch, length), group in _grouped(rows, "batch", "input_len"):
        engines = list(_grouped(group, "backend", "policy", "budget", "chunk"))
        stock = [rounds for (backend, *_), rounds in engines if backend != "ROCO"]
        base = _mean(stock[0], "ttft_ms") if stock else math.nan
        for (backend, policy, budget, chunk), again in engines:
            # the newest of each round counts
            rounds = list({row["round"]: row for row in again}.values())
            time = _mean(rounds, "ttft_ms")
            low = min(float(row["ttft_low_ms"]) for row in rounds)
            high = max(float(row["ttft_high_ms"]) for row in rounds)
            lines.append(
                {
                    "prompts": f"{batch} x {length}",
                    "engine": policy or backend,
                    "budget": budget,
                    "chunk": chunk,
                    "TTFT ms": f"{time:.1f} ({low:.1f} to {high:.1f})",
                    "ratio": f"{time / base:.3f}",
                    "rounds": str(len(rounds)),
                }
            )
    return _table(f"{rows[-1]['model']}, {_code(rows[-1])}", lines)


def eviction(rows: list[Row]) -> str:
    """Return the table of a step's end."""
    kinds = [name.removesuffix("_us") for name in rows[0] if name.endswith("_us")]
    lines = [
        {
            "what": f"{kind.replace('_', ' ')}, us",
            **{
                row["policy"]: f"{float(row[f'{kind}_us']):.1f} "
                f"({float(row[f'{kind}_low']):.1f} to {float(row[f'{kind}_high']):.1f})"
                for row in rows
            },
        }
        for kind in kinds
    ]
    for column in ("nothing_due_share", "all_due_steps", "moved_blocks"):
        lines.append(
            {
                "what": column.replace("_", " "),
                **{row["policy"]: row[column] for row in rows},
            }
        )
    return _table(_code(rows[-1]), lines)


def profile(rows: list[Row]) -> str:
    """Return a table for each variant and kind of step."""
    parts = []
    for (variant, step), group in _grouped(rows, "variant", "step"):
        total = sum(float(row["us"]) for row in group)
        ours = sum(float(row["share"]) for row in group if row["ours"] == "yes")
        lines = [
            {
                "kernel": f"`{row['kernel']}`",
                "ours": row["ours"],
                "calls": row["calls"],
                "us": row["us"],
                "share": f"{float(row['share']):.2%}",
            }
            for row in group
        ]
        parts.append(
            _table(
                f"{variant}, {step} step of {float(group[0]['step_us']):.0f} us: "
                f"{total:.0f} us of kernels, ours {ours:.1%}, the GPU idle for "
                f"{float(group[0]['idle_us']):.0f} us; meanwhile the scheduler took "
                f"{float(group[0]['scheduler_us']):.0f} us; "
                f"{group[-1]['model']}, {_code(group[-1])}",
                lines,
            )
        )
    return "\n".join(parts)


def scheduler(rows: list[Row]) -> str:
    """Return the table of the scheduler's Python."""
    rows = [row for row in rows if _code(row) == _code(rows[-1])]
    lines = [
        {
            "scheduler": row["side"],
            "schedule, us": f"{row['schedule_us']} ({row['schedule_low']} to "
            f"{row['schedule_high']}), mean {row['schedule_mean']}",
            "update, us": f"{row['update_us']} ({row['update_low']} to "
            f"{row['update_high']}), mean {row['update_mean']}",
        }
        for row in rows
    ]
    return _table(f"{rows[-1]['cpu']}, {_code(rows[-1])}", lines)


def memory(rows: list[Row]) -> str:
    """Return the table of what sequences hold."""
    columns = (
        *("model", "backend", "max_running", "preemptions"),
        *("peak_sequence_tokens", "bound_tokens", "statistics_share"),
    )
    rows = [row for row in rows if _code(row) == _code(rows[-1])]
    lines = [{name.replace("_", " "): row[name] for name in columns} for row in rows]
    return _table(_code(rows[-1]), lines)


def decode(rows: list[Row]) -> str:
    """Return the table of the decode kernel."""
    ratios = [float(row["ratio"]) for row in rows]
    lines = []
    for heads, group in _grouped(rows, "q_heads", "kv_heads", "head_size"):
        line = {"heads": "/".join(heads)}
        for row in group:
            line[f"{row['batch']} x {row['context']}"] = f"{float(row['ratio']):.3f}"
        lines.append(line)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return _table(
        f"geometric mean {mean:.3f}, smallest {min(ratios):.3f}, {rows[-1]['gpu']}",
        lines,
    )


def _code(row: Row) -> str:
    gpu = "no GPU" if row["gpu"] == "none" else row["gpu"]
    flags = f", `{row['flags']}`" if row.get("flags") else ""
    return f"{gpu}, vLLM {row['vllm']}, commit {row['commit']}{flags}"


def _grouped(
    rows: list[Row], *columns: str
) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
    """Yield the rows by their values in some columns, in the order of appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    yield from groups.items()


def _mean(rows: Sequence[Row], column: str) -> float:
    return sum(float(row[column]) for row in rows) / len(rows)


def _number(text: str, digits: int) -> str:
    return f"{float(text):,.{digits}f}" if text else ""


def _table(caption: str, lines: Sequence[dict[str, str]]) -> str:
    rendered = tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
    return f"{caption}:\n\n{rendered}\n"


_OTHERS: dict[str, Callable[[list[Row]], str]] = {
    "prefill": prefill,
    "eviction": eviction,
    "profile": profile,
    "scheduler": scheduler,
    "memory": memory,
    "decode_attention": decode,
}
"""Tables beside those of `WORKLOADS`, by the name of their CSV file."""
