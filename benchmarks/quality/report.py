# SPDX-License-Identifier: Apache-2.0
"""The table as Markdown, section by section, printed or put into a document.

A document marks the place of a section by two comments, `<!-- report: NAME -->` and
`<!-- end of report -->`; what is between them is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from benchmarks.quality.cells import GENERATION, PERPLEXITY, PERPLEXITY_GENERATION
from benchmarks.quality.grid import LEAST_FULL_ACCURACY
from benchmarks.quality.measured import Measured
from benchmarks.quality.table import Row

_SECTION = re.compile(r"(<!-- report: (\w+) -->\n).*?(<!-- end of report -->)", re.S)
_VERDICTS = (
    (0.95, "safe on these tasks"),
    (0.8, "measure your own task first"),
    (0.5, "loses much: only for tasks of the newest text"),
    (0.0, "broken: do not serve"),
)
"""Least share of the full cache's accuracy, on the worst task."""


def markdown(path: Path) -> str:
    """Return all sections of a table's report."""
    return "\n\n".join(sections(Measured.read(path)).values())


def fill(document: Path, path: Path) -> None:
    """Replace the sections that a document marks.

    Raises:
        ValueError: It marks a section that there is none of.
    """
    texts = sections(Measured.read(path))

    def section(match: re.Match[str]) -> str:
        name = match[2]
        if name not in texts:
            raise ValueError(
                f"{document} has a section {name!r}, which is not one of "
                f"{', '.join(texts)}."
            )
        return f"{match[1]}\n{texts[name]}\n\n{match[3]}"

    text = document.read_text(encoding="utf-8")
    document.write_text(_SECTION.sub(section, text), encoding="utf-8")


def sections(measured: Measured) -> dict[str, str]:
    """Return the report's parts by name."""
    return {
        "source": _source(measured),
        "choice": _choice(measured),
        "budget": _accuracy(measured),
        "unsolved": _unsolved(measured),
        "perplexity": _perplexity(measured),
        "generation": _generation(measured),
        "stride": _strides(measured),
    }


def _source(measured: Measured) -> str:
    def each(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in measured.rows))

    return (
        f"Model {each('model')} on {each('gpu')}, commit {each('commit')}, seed "
        f"{each('seed')}; {len(measured.rows)} rows."
    )


def _choice(measured: Measured) -> str:
    """Return what the default comes to at every share of the context."""
    shares: dict[float, list[Row]] = {}
    for task, context in measured.tasks():
        if measured.is_solved(task, context):
            for row in measured.at_budgets(task, context, "accuracy"):
                if row["method"] == measured.default_method and row["of_full"]:
                    shares.setdefault(float(row["budget_ratio"]), []).append(row)
    lines = []
    for ratio, rows in sorted(shares.items(), reverse=True):
        worst = min(rows, key=lambda row: float(row["of_full"]))
        verdict = next(
            text for least, text in _VERDICTS if float(worst["of_full"]) >= least
        )
        lines.append(
            [
                _percent(ratio),
                _mean([float(row["of_full"]) for row in rows]),
                f"{_interval(worst, 'of_full')} ({_name(worst)})",
                verdict,
            ]
        )
    header = ["budget / context", "of the full cache, mean", "worst task", "verdict"]
    return _table(lines, header)


def _accuracy(measured: Measured) -> str:
    parts = []
    for task, context in measured.tasks():
        rows = measured.at_budgets(task, context, "accuracy")
        full = measured.full(task, context, "accuracy")
        if not rows or full is None or not measured.is_solved(task, context):
            continue
        title = f"**{_name(full)}**, n = {full['n']}, full cache {_interval(full)}"
        parts.append(f"{title}\n\n{_by_budget(measured, rows, 'score')}")
    return "\n\n".join(parts)


def _unsolved(measured: Measured) -> str:
    lines = [
        [_name(full), _interval(full), full["n"]]
        for task, context in measured.tasks()
        if (full := measured.full(task, context, "accuracy")) is not None
        and not measured.is_solved(task, context)
    ]
    if not lines:
        return f"None: the full cache reaches {LEAST_FULL_ACCURACY} everywhere."
    return _table(lines, ["task", "full cache", "n"])


def _perplexity(measured: Measured) -> str:
    names = {
        PERPLEXITY: "Read as a prompt",
        PERPLEXITY_GENERATION: "As if generated",
    }
    parts = []
    for task, context in measured.tasks():
        rows = measured.at_budgets(task, context, "perplexity")
        full = measured.full(task, context, "perplexity")
        if task not in names or not rows or full is None:
            continue
        title = (
            f"**{names[task]}**, {int(context):,} tokens, n = {full['n']}, full cache "
            f"{_interval(full)}; perplexity over the full cache's"
        )
        parts.append(f"{title}\n\n{_by_budget(measured, rows, 'of_full')}")
    return "\n\n".join(parts)


def _generation(measured: Measured) -> str:
    metrics = ("agreement", "divergence", "perplexity")
    lines = []
    for agreement in measured.select(task=GENERATION, metric="agreement"):
        same = {
            name: agreement[name]
            for name in ("context", "method", "budget", "stride", "chunk")
        }
        rows = [
            measured.select(task=GENERATION, metric=metric, **same)[0]
            for metric in metrics
        ]
        share = float(agreement["budget_ratio"])
        budget = "" if agreement["method"] == "full" else _percent(share)
        cells = [_interval(rows[0]), _interval(rows[1], digits=0), _interval(rows[2])]
        lines.append([agreement["method"], budget, *cells, agreement["n"]])
    header = [
        *("method", "budget / text", "tokens the full cache would choose too"),
        *("tokens to the first other one", "perplexity under the full cache", "n"),
    ]
    return _table(lines, header)


def _strides(measured: Measured) -> str:
    lines = []
    strides: list[int] = []
    for same_chunk in (False, True):
        for method in measured.methods():
            rows = measured.at_strides(method, same_chunk=same_chunk)
            if len({row["stride"] for row in rows}) < 2:
                continue
            strides = sorted({int(row["stride"]) for row in rows} | set(strides))
            for key in dict.fromkeys(
                (row["task"], row["context"], row["metric"]) for row in rows
            ):
                line = {
                    int(row["stride"]): row
                    for row in rows
                    if (row["task"], row["context"], row["metric"]) == key
                }
                first = next(iter(line.values()))
                chunk = f"{first['chunk']}" if same_chunk else "as the stride"
                name = f"{_name(first)} at {_percent(float(first['budget_ratio']))}"
                lines.append((name, method, chunk, first["n"], line))
    table = [
        [*labels, *(_interval(line[s]) if s in line else "" for s in strides)]
        for *labels, line in lines
    ]
    return _table(table, ["task", "method", "chunk", "n", *map(str, strides)])


def _by_budget(measured: Measured, rows: Sequence[Row], score: str) -> str:
    ratios = sorted({float(row["budget_ratio"]) for row in rows}, reverse=True)
    lines = []
    for method in measured.methods():
        cells = {
            float(row["budget_ratio"]): _interval(
                row, score, digits=3 if score == "of_full" else 2
            )
            for row in rows
            if row["method"] == method
        }
        if cells:
            name = f"**{method}** (default)"
            label = name if method == measured.default_method else method
            lines.append([label, *(cells.get(ratio, "") for ratio in ratios)])
    return _table(lines, ["method", *map(_percent, ratios)])


def _interval(row: Row, score: str = "score", digits: int = 2) -> str:
    prefix = "ci" if score == "score" else score
    value, low, high = (
        f"{float(row[name]):.{digits}f}"
        for name in (score, f"{prefix}_low", f"{prefix}_high")
    )
    return f"{value} [{low}, {high}]"


def _name(row: Row) -> str:
    return f"{row['task']} {int(row['context']):,}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}"


def _table(lines: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    if not lines:
        return "Not measured yet."
    return str(tabulate(lines, header, tablefmt="github", disable_numparse=True))
