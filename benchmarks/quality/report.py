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

from benchmarks.quality.ablation_report import ablation_table
from benchmarks.quality.cells import GENERATION, PERPLEXITY, PERPLEXITY_GENERATION
from benchmarks.quality.grid import LEAST_FULL_ACCURACY
from benchmarks.quality.measured import Measured
from benchmarks.quality.table import Row

_SECTION = re.compile(r"(<!-- report: (\w+) -->\n).*?(<!-- end of report -->)", re.S)
_QUARTER = "0.25"
_UNMEASURED = "Not measured yet."
_VERDICTS = (
    (0.95, "safe on these tasks"),
    (0.8, "measure your own task first"),
    (0.5, "loses much: only for tasks of the newest text"),
    (0.0, "broken: do not serve"),
)
"""Least share of the full cache's accuracy, on the worst task."""


def markdown(path: Path) -> str:
    """Return all sections of a table's report."""
    return "\n\n".join(
        f"<!-- {name} -->\n{text}"
        for name, text in sections(Measured.read(path)).items()
    )


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
        "headline": _headline(measured),
        "observations": _observations(measured),
        "choice": _choice(measured),
        "budget": _accuracy(measured),
        "unsolved": _unsolved(measured),
        "perplexity": _perplexity(measured),
        "generation": _generation(measured),
        "stride": _strides(measured),
        "ablation": ablation_table(measured.ablation) or _UNMEASURED,
        "kvpress": _kvpress(measured),
    }


def _source(measured: Measured) -> str:
    def each(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in measured.rows))

    return (
        f"Model {each('model')} on {each('gpu')}, commit {each('commit')}, seed "
        f"{each('seed')}; {len(measured.rows)} rows."
    )


def _headline(measured: Measured) -> str:
    """Return a small table for a front page: every method at a quarter."""
    columns = [
        (task, context)
        for task, context in measured.tasks()
        if task in ("passkey", "needle")
        and any(
            row["budget_ratio"] == _QUARTER
            for row in measured.at_budgets(task, context, "accuracy")
        )
    ]
    lines = []
    for method in ("full", *measured.methods()):
        cells = []
        for task, context in columns:
            rows = measured.at_budgets(task, context, "accuracy")
            row = next(
                (
                    row
                    for row in rows
                    if (row["method"], row["budget_ratio"]) == (method, _QUARTER)
                ),
                measured.full(task, context, "accuracy") if method == "full" else None,
            )
            cells.append(_interval(row) if row is not None else "")
        lines.append([_label(measured, method), *cells])
    titles = [f"{task} {int(context):,}" for task, context in columns]
    return _table(lines, ["kept", *titles])


def _observations(measured: Measured) -> str:
    """Return in words what a budget and a stride do to accuracy."""
    method = measured.default_method
    found = []
    for task, context in measured.tasks():
        rows = [
            row
            for row in measured.at_budgets(task, context, "accuracy")
            if row["method"] == method
        ]
        full = measured.full(task, context, "accuracy")
        if rows and full is not None and measured.is_solved(task, context):
            rows.sort(key=lambda row: -float(row["budget_ratio"]))
            values = ", ".join(
                f"{float(row['score']):.2f} at {_percent(float(row['budget_ratio']))}"
                for row in rows
            )
            found.append(f"{_name(full)}: {float(full['score']):.2f} in full, {values}")
    lines = _bullets(f"**Accuracy against the budget**, {method}", found)
    for same_chunk, chunk in ((False, "chunks as long as it"), (True, "equal chunks")):
        found = []
        for key, line in _stride_lines(measured, method, same_chunk).items():
            if key[2] == "accuracy":
                values = ", ".join(
                    f"{float(row['score']):.2f} at {stride}"
                    for stride, row in line.items()
                )
                ratio = _percent(float(next(iter(line.values()))["budget_ratio"]))
                found.append(f"{key[0]} {int(key[1]):,} at {ratio}: {values}")
        lines += _bullets(f"**Accuracy against the stride**, {method}, {chunk}", found)
    return "\n".join(lines)


def _bullets(title: str, found: Sequence[str]) -> list[str]:
    return [f"* {title}:", *(f"  * {text}" for text in found or [_UNMEASURED])]


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
                ", ".join(_name(row) for row in rows),
                _mean([float(row["of_full"]) for row in rows]),
                f"{_interval(worst, 'of_full')} ({_name(worst)})",
                verdict,
            ]
        )
    header = [
        "budget / context",
        "measured",
        "of the full cache, mean",
        "worst task",
        "verdict",
    ]
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
    for same_chunk in (False, True):
        for method in measured.methods():
            for line in _stride_lines(measured, method, same_chunk).values():
                first = next(iter(line.values()))
                chunk = first["chunk"] if same_chunk else "as the stride"
                name = f"{_name(first)} at {_percent(float(first['budget_ratio']))}"
                lines.append(((name, method, chunk, first["n"]), line))
    strides = sorted({stride for _, line in lines for stride in line})
    table = [
        [*labels, *(_interval(line[s]) if s in line else "" for s in strides)]
        for labels, line in lines
    ]
    return _table(table, ["task", "method", "chunk", "n", *map(str, strides)])


def _kvpress(measured: Measured) -> str:
    lines = [
        [
            _name(row),
            "full cache" if row["method"] == "full" else row["method"],
            _percent(float(row["budget_ratio"])),
            _interval(row),
            row["n"],
        ]
        for row in measured.kvpress
    ]
    return _table(lines, ["task", "press", "kept", "accuracy", "n"])


def _stride_lines(
    measured: Measured, method: str, same_chunk: bool
) -> dict[tuple[str, str, str], dict[int, Row]]:
    """Return stride to row, for every task, context and metric."""
    lines: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in measured.at_strides(method, same_chunk=same_chunk):
        key = (row["task"], row["context"], row["metric"])
        lines.setdefault(key, {})[int(row["stride"])] = row
    return lines


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
            label = _label(measured, method)
            lines.append([label, *(cells.get(ratio, "") for ratio in ratios)])
    return _table(lines, ["method", *map(_percent, ratios)])


def _interval(row: Row, score: str = "score", digits: int = 2) -> str:
    prefix = "ci" if score == "score" else score
    value, low, high = (
        f"{float(row[name]):.{digits}f}"
        for name in (score, f"{prefix}_low", f"{prefix}_high")
    )
    return f"{value} [{low}, {high}]"


def _label(measured: Measured, method: str) -> str:
    if method == "full":
        return "full cache"
    return f"**{method}** (default)" if method == measured.default_method else method


def _name(row: Row) -> str:
    return f"{row['task']} {int(row['context']):,}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}"


def _table(lines: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    if not lines:
        return _UNMEASURED
    return str(tabulate(lines, header, tablefmt="github", disable_numparse=True))
