# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/performance.md, from the CSV files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from benchmarks.serving.comparisons import Comparison, Row, comparisons
from benchmarks.serving.table import rows_of


def report(results: Path) -> str:
    """Return markdown, a section for each table that has rows.

    Args:
        results: Folder of the tables.
    """
    sections = [
        *serving(rows_of(results / "serving.csv")),
        *prefill(rows_of(results / "prefill.csv")),
        *eviction(rows_of(results / "eviction.csv")),
        *profile(rows_of(results / "profile.csv")),
        *scheduler(rows_of(results / "scheduler.csv")),
        *memory(rows_of(results / "memory.csv")),
        *decode(rows_of(results / "decode_attention.csv")),
    ]
    return "\n\n".join(sections) + "\n"


def serving(rows: list[Row]) -> Iterator[str]:
    """Yield a section for each workload."""
    found: dict[str, list[Comparison]] = {}
    for comparison in comparisons(rows):
        found.setdefault(comparison.baseline["workload"], []).append(comparison)
    for workload, group in found.items():
        lines = [line for comparison in group for line in _serving_lines(comparison)]
        newest = group[-1].baseline
        yield _section(f"{workload}, {newest['model']} ({_code(newest)})", lines)


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


def prefill(rows: list[Row]) -> Iterator[str]:
    """Yield the section of the times to first token, each beside FLASH_ATTN's."""
    if not rows:
        return
    rows = [row for row in rows if _code(row) == _code(rows[-1])]
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
    yield _section(f"prefill ({_code(rows[-1])})", lines)


def eviction(rows: list[Row]) -> Iterator[str]:
    """Yield the section of a step's end."""
    if not rows:
        return
    kinds = [name.removesuffix("_us") for name in rows[0] if name.endswith("_us")]
    lines = [
        {
            "us": kind.replace("_", " "),
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
                "us": column.replace("_", " "),
                **{row["policy"]: row[column] for row in rows},
            }
        )
    yield _section(f"end of a step ({_code(rows[-1])})", lines)


def profile(rows: list[Row]) -> Iterator[str]:
    """Yield a section for each variant and kind of step."""
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
        yield _section(
            f"profile of {variant}, {step} step: {total:.0f} us, ours {ours:.1%} "
            f"({_code(group[-1])})",
            lines,
        )


def scheduler(rows: list[Row]) -> Iterator[str]:
    """Yield the section of the scheduler's Python."""
    if not rows:
        return
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
    yield _section(f"scheduler, {rows[-1]['cpu']} ({_code(rows[-1])})", lines)


def memory(rows: list[Row]) -> Iterator[str]:
    """Yield the section of what sequences hold."""
    if not rows:
        return
    columns = (
        *("model", "backend", "max_running", "preemptions"),
        *("peak_sequence_tokens", "bound_tokens", "statistics_share"),
    )
    lines = [{name.replace("_", " "): row[name] for name in columns} for row in rows]
    yield _section(f"memory ({_code(rows[-1])})", lines)


def decode(rows: list[Row]) -> Iterator[str]:
    """Yield the section of the decode kernel."""
    if not rows:
        return
    ratios = [float(row["ratio"]) for row in rows]
    lines = []
    for heads, group in _grouped(rows, "q_heads", "kv_heads", "head_size"):
        line = {"heads": "/".join(heads)}
        for row in group:
            line[f"{row['batch']} x {row['context']}"] = f"{float(row['ratio']):.3f}"
        lines.append(line)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    yield _section(
        f"decode, FlashAttention 3 over ours: geometric mean {mean:.3f}, smallest "
        f"{min(ratios):.3f}",
        lines,
    )


def _code(row: Row) -> str:
    return ", ".join(row[column] for column in ("gpu", "vllm", "commit"))


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


def _section(title: str, lines: Sequence[dict[str, str]]) -> str:
    return f"### {title}\n\n" + tabulate(
        lines, headers="keys", tablefmt="github", disable_numparse=True
    )
