# SPDX-License-Identifier: Apache-2.0
"""The pictures of docs/performance.md, from the CSV files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
# text stays text, and a picture is the same whenever it is drawn
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "roco"})

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from benchmarks.serving.comparisons import (  # noqa: E402
    Comparison,
    Row,
    comparisons,
    newest_settings,
)
from benchmarks.serving.table import rows_of  # noqa: E402

GREY, PALE_GREY, PALE_BLUE, BLUE, DARK_BLUE = COLOURS = (
    *("#8a8f98", "#c5c9d0"),
    *("#7fb3e6", "#1f6fc4", "#0b3d78"),
)
FORMATS = ("svg", "png")


def plot(results: Path, out: Path) -> list[Path]:
    """Draw a picture for each table that has what it needs.

    Args:
        results: Folder of the tables.
        out: Folder of the pictures.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Comparison]] = {}
    for each in comparisons(rows_of(results / "serving.csv")):
        found.setdefault(each.baseline["workload"], []).append(each)
    written: list[Path] = []

    def picture(name: str, draw: Callable[..., None], *rows: Sequence[object]) -> None:
        if all(rows):
            written.extend(_picture(out / name, partial(draw, *rows)))

    def table(name: str) -> list[Row]:
        return rows_of(results / f"{name}.csv")

    picture("throughput", throughput, found.get("r-kv-stress", []))
    picture("crossover", crossover, found.get("crossover", []))
    long_prompts = [row for row in table("prefill") if row["batch"] == "1"]
    picture("prefill", prefill, long_prompts)
    picture("decode_ratio", decode_ratio, table("decode_attention"))
    picture("resident_tokens", resident_tokens, table("memory_steps"), table("memory"))
    return written


def colour(engine: str) -> str:
    """Return the colour of an engine: stock vLLM grey, RoCo blue."""
    if engine.startswith("roco"):
        return PALE_BLUE if "," in engine else BLUE
    return PALE_GREY if "," in engine else GREY


def throughput(found: Sequence[Comparison], axes: Axes) -> None:
    """Bars of tokens a second for each memory size, with the ratio on top."""
    names = list(dict.fromkeys(name for each in found for name in each.rows))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        groups = [(x, each) for x, each in enumerate(found) if name in each.rows]
        places = [x + (index - (len(names) - 1) / 2) * width for x, _ in groups]
        heights = [float(each.rows[name]["output_tok_s"]) for _, each in groups]
        bars = axes.bar(places, heights, 0.94 * width, label=name, color=colour(name))
        ratios = [f"{each.ratio(name):.2f}" for _, each in groups]
        axes.bar_label(bars, ratios, fontsize=8, padding=2)
    memory = [each.baseline["gpu_memory_utilization"] for each in found]
    axes.set_xticks(range(len(found)), memory)
    axes.set_xlabel("--gpu-memory-utilization")
    axes.set_ylabel("output tokens per second")
    axes.margins(y=0.1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_title(_work(found[0].baseline), fontsize=9)


def crossover(found: Sequence[Comparison], axes: Axes) -> None:
    """Throughput over stock vLLM's against the length of a sequence."""
    found = sorted(found, key=lambda each: _length(each.baseline))
    lengths = [_length(each.baseline) for each in found]
    names = list(dict.fromkeys(name for each in found for name in each.rows))[1:]
    for name in names:
        ratios = [each.ratio(name) for each in found]
        axes.plot(lengths, ratios, "o-", color=colour(name), label=name)
        for length, ratio in zip(lengths, ratios, strict=True):
            axes.annotate(
                f"{ratio:.2f}",
                (length, ratio),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                fontsize=8,
            )
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.set_xlabel("tokens of a sequence at its end")
    axes.set_ylabel("throughput over stock vLLM's")
    baseline = found[0].baseline
    axes.set_title(
        f"{baseline['model']}, {baseline['gpu']}, memory "
        f"{baseline['gpu_memory_utilization']}",
        fontsize=9,
    )


def resident_tokens(steps: list[Row], memory: list[Row], axes: Axes) -> None:
    """What one sequence holds against what it has computed, and its bounds."""
    steps = [row for row in steps if row["first_held_tokens"]]
    computed = [int(row["first_computed_tokens"]) for row in steps]
    held = [int(row["first_held_tokens"]) for row in steps]
    (options,) = (row for row in memory[-2:] if row["budget"])
    budget, stride = int(options["budget"]), int(options["stride"])
    axes.plot(computed, computed, color=GREY, label="full cache")
    axes.step(computed, held, where="pre", color=BLUE, label="roco holds")
    for label, tokens, style in (
        ("the manager's bound", int(options["bound_tokens"]), "-"),
        ("budget + stride", budget + stride, "--"),
        ("budget", budget, ":"),
    ):
        axes.axhline(tokens, color=DARK_BLUE, linewidth=1, linestyle=style, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens computed")
    axes.set_ylabel("KV tokens held by one sequence")


def prefill(rows: list[Row], axes: Axes) -> None:
    """Time to first token of a long prompt against the chunk, with each set of flags.

    Args:
        rows: Of `prefill.csv`.
        axes: Where to draw.
    """
    colours = ((PALE_GREY, PALE_BLUE), (GREY, BLUE))
    for setting, (grey, blue) in zip(
        newest_settings(rows), cycle(colours), strict=False
    ):
        is_off = '"mode":0' in setting[0]["flags"].replace(" ", "")
        flags = ", torch.compile off" if is_off else ""
        stock = [row for row in setting if row["backend"] != "ROCO"]
        if not stock:
            continue
        axes.axhspan(
            min(float(row["ttft_low_ms"]) for row in stock),
            max(float(row["ttft_high_ms"]) for row in stock),
            color=grey,
            label=f"{stock[0]['backend']}{flags}",
        )
        roco = [row for row in setting if row["policy"] == "roco"]
        middle = [float(row["ttft_ms"]) for row in roco]
        below = [float(row["ttft_ms"]) - float(row["ttft_low_ms"]) for row in roco]
        above = [float(row["ttft_high_ms"]) - float(row["ttft_ms"]) for row in roco]
        axes.errorbar(
            [int(row["chunk"]) for row in roco],
            middle,
            [below, above],
            fmt="o",
            color=blue,
            label=f"roco{flags}",
        )
    axes.set_xscale("log", base=2)
    chunks = sorted({int(row["chunk"]) for row in rows if row["chunk"]})
    axes.set_xticks(chunks, [str(chunk) for chunk in chunks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("chunk, tokens")
    axes.set_ylabel("time to first token, ms")
    axes.set_title(f"a prompt of {rows[0]['input_len']} tokens", fontsize=9)


def decode_ratio(rows: list[Row], axes: Axes) -> None:
    """FlashAttention 3's time over ours, a mark for each kind of heads."""
    work = list(dict.fromkeys((row["batch"], row["context"]) for row in rows))
    heads = list(
        dict.fromkeys((r["q_heads"], r["kv_heads"], r["head_size"]) for r in rows)
    )
    for index, kind in enumerate(heads):
        mine = [
            row
            for row in rows
            if (row["q_heads"], row["kv_heads"], row["head_size"]) == kind
        ]
        axes.plot(
            [work.index((row["batch"], row["context"])) for row in mine],
            [float(row["ratio"]) for row in mine],
            "osD^v"[index % 5],
            color=COLOURS[index % 5],
            label=f"{kind[0]}/{kind[1]} heads of {kind[2]}",
        )
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_xticks(range(len(work)), [f"{b} x {int(c) // 1024}K" for b, c in work])
    axes.set_xlabel("sequences x tokens")
    axes.set_ylabel("FlashAttention 3's time over ours")


def _work(row: Row) -> str:
    lengths = (
        f"{row['num_requests']} x ({row['input_len']} + {row['output_len']}) tokens"
    )
    return f"{lengths}, {row['model']}, {row['gpu']}"


def _length(row: Row) -> int:
    return int(row["input_len"]) + int(row["output_len"])


def _picture(path: Path, draw: Callable[[Axes], None]) -> list[Path]:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    files = [path.with_suffix(f".{suffix}") for suffix in FORMATS]
    for file in files:
        # an SVG's date would change with every drawing
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, dpi=150, metadata=metadata)
    plt.close(figure)
    return files
