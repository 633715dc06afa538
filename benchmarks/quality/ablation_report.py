# SPDX-License-Identifier: Apache-2.0
"""The ablation's summary as Markdown: every candidate beside the default."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from benchmarks.quality.cells import PERPLEXITY
from benchmarks.quality.table import Row

SIGNIFICANT = 0.05
_DEFAULT = "default"
# task, context, budget as a share of the context
_Cell = tuple[str, str, str]


def ablation_table(rows: Sequence[Row]) -> str:
    """Return a table for each phase, most accurate candidates first.

    Candidates that lack a cell are left out; their number is told.

    Args:
        rows: Of `ablation_summary.csv`.
    """
    phases = dict.fromkeys(row["phase"] for row in rows)
    return "\n\n".join(
        _phase([row for row in rows if row["phase"] == phase]) for phase in phases
    )


def _phase(rows: Sequence[Row]) -> str:
    cells = sorted({_cell(row) for row in rows}, key=_order)
    found: dict[str, dict[_Cell, Row]] = {}
    for row in rows:
        found.setdefault(row["candidate"], {})[_cell(row)] = row
    whole = {name: at for name, at in found.items() if len(at) == len(cells)}

    def solved(name: str) -> float:
        return sum(
            float(row["score"])
            for row in whole[name].values()
            if row["task"] != PERPLEXITY
        )

    lines = [
        [
            f"**{name}**" if name == _DEFAULT else f"`{name}`",
            *(_score(whole[name][cell], name) for cell in cells),
        ]
        for name in sorted(whole, key=lambda name: -solved(name))
    ]
    header = ["change"] + [
        f"{task} {int(context):,}, {100 * float(ratio):g} %"
        for task, context, ratio in cells
    ]
    table = tabulate(lines, header, tablefmt="github", disable_numparse=True)
    first = rows[0]
    title = (
        f"**{first['phase'].capitalize()}**, {first['dtype']}, problems a cell: "
        f"{_numbers(rows)}, seed {first['seed']}"
    )
    if missing := len(found) - len(whole):
        title += f"; {missing} more were not measured in every cell"
    return f"{title}\n\n{table}"


def _cell(row: Row) -> _Cell:
    return row["task"], row["context"], row["budget_ratio"]


def _order(cell: _Cell) -> tuple[bool, str, int, float]:
    """Accuracies before perplexities, and larger budgets before smaller ones."""
    task, context, ratio = cell
    return task == PERPLEXITY, task, int(context), -float(ratio)


def _score(row: Row, name: str) -> str:
    differs = name != _DEFAULT and float(row["p_value"]) < SIGNIFICANT
    return f"{float(row['score']):.2f}{'*' if differs else ''}"


def _numbers(rows: Sequence[Row]) -> str:
    numbers = dict.fromkeys((row["n"], row["task"] == PERPLEXITY) for row in rows)
    return ", ".join(
        f"{n} for perplexity" if is_prose else n
        for n, is_prose in sorted(numbers, key=lambda pair: pair[1])
    )
