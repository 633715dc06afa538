# SPDX-License-Identifier: Apache-2.0
"""What the defaults rest on: one change at a time, on the same problems.

    python -m benchmarks.quality.ablation --out DIR --device cuda --screen
    python -m benchmarks.quality.ablation --out DIR --device cuda --confirm NAME ...

`--screen` compares all of `candidates.CANDIDATES` on 64 problems a cell, `--confirm`
the named ones on 400 problems that nothing was chosen by. Every cell is appended to
`ablation.csv` as soon as it is known, and left out by later runs; `--part 2/4` takes
the second of four shares, for processes that work side by side. At the end all that is
known is compared with the default in `ablation_summary.csv`: answers by McNemar's test,
perplexity by Wilcoxon's.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.quality import intervals
from benchmarks.quality.candidates import CANDIDATES, DEFAULT, Candidate
from benchmarks.quality.cells import PERPLEXITY
from benchmarks.quality.oracle import Keep, Oracle
from benchmarks.quality.paired import compare_answers, compare_nats
from benchmarks.quality.tasks import Problem, build, prose
from tools.smollm2 import smollm2_path

MOST_PASSAGES = 48
"""The novel has no more text than that."""


@dataclass(frozen=True)
class Cell:
    """One task at one budget; a perplexity is that of a passage's second half."""

    task: str
    context: int
    budget_ratio: float


SCREEN_CELLS = (
    Cell("passkey", 2048, 0.125),
    Cell("needle", 1024, 0.5),
    Cell("needle", 1024, 0.25),
    Cell("needle", 2048, 0.5),
    Cell("needle", 2048, 0.25),
    Cell(PERPLEXITY, 2048, 0.5),
    Cell(PERPLEXITY, 2048, 0.25),
)
CONFIRM_CELLS = (
    *SCREEN_CELLS,
    Cell("passkey", 2048, 0.25),
    Cell("passkey", 4096, 0.125),
)


@dataclass(frozen=True)
class Phase:
    """How many problems, and which."""

    name: str
    cells: tuple[Cell, ...]
    n: int
    seed: int


# both below `tasks.FIRST_REPORT_SEED`: a report reads other problems
SCREEN = Phase("screen", SCREEN_CELLS, n=64, seed=1_000)
CONFIRM = Phase("confirm", CONFIRM_CELLS, n=400, seed=20_000)

_CELL = ("phase", "model", "dtype", "n", "seed", "task", "context", "budget_ratio")
_SETTING = (*_CELL, "candidate", *(field.name for field in fields(Keep)))
_SCORE = ("score", "ci_low", "ci_high")
FIELDS = (*_SETTING, *_SCORE, "seconds", "values")
SUMMARY_FIELDS = (*_CELL, "candidate", *_SCORE, "better", "worse", "p_value")


class Judge:
    """Runs ways of keeping over cells, with the problems of a cell made once."""

    def __init__(self, model: str, device: str, dtype: torch.dtype) -> None:
        self._oracle = Oracle(model, device, dtype)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._problems = functools.cache(self._build)
        self._passages = functools.cache(functools.partial(prose, self._tokenizer))

    def values(self, keep: Keep, cell: Cell, phase: Phase) -> list[float]:
        """Return a number for each problem: 1 if solved, or mean nats of a passage."""
        if cell.task == PERPLEXITY:
            n = _number(phase, cell)
            passages = self._passages(cell.context, n, phase.seed)
            losses = self._oracle.losses(passages, keep, cell.context // 2, "prompt")
            return [statistics.fmean(row) for row in losses]
        problems = self._problems(cell.task, cell.context, phase.n, phase.seed)
        prompts = [problem.token_ids for problem in problems]
        answers = self._oracle.generate(prompts, keep, problems[0].max_tokens)
        return [
            problem.score(str(self._tokenizer.decode(answer)))
            for problem, answer in zip(problems, answers, strict=True)
        ]

    def _build(self, task: str, context: int, n: int, seed: int) -> list[Problem]:
        return build(task, self._tokenizer, context, n, seed)


class Table:
    """The rows of `ablation.csv`, which several processes may append to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path.with_suffix(".lock"))

    def rows(self) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        with self._lock, self._path.open(newline="") as file:
            return list(csv.DictReader(file))

    def append(self, row: dict[str, Any]) -> None:
        with self._lock, self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


@dataclass(frozen=True)
class Setting:
    """One candidate in one cell of one phase."""

    phase: Phase
    model: str
    dtype: str
    candidate: Candidate
    cell: Cell

    @property
    def keep(self) -> Keep:
        """What is kept."""
        return self.candidate.keep(int(self.cell.budget_ratio * self.cell.context))

    def columns(self) -> dict[str, Any]:
        """Return what tells it from all others in a table."""
        keep = self.keep
        return {
            "phase": self.phase.name,
            "model": self.model,
            "dtype": self.dtype,
            "n": _number(self.phase, self.cell),
            "seed": self.phase.seed,
            **asdict(self.cell),
            "candidate": self.candidate.name,
            **asdict(keep),
            "options": json.dumps(dict(keep.options)),
        }


def _number(phase: Phase, cell: Cell) -> int:
    return min(phase.n, MOST_PASSAGES) if cell.task == PERPLEXITY else phase.n


def summarise(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Compare every row with the default's on the same problems."""

    def cell_of(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in _CELL)

    def values_of(row: dict[str, str]) -> list[float]:
        return [float(value) for value in row["values"].split()]

    defaults = {
        cell_of(row): values_of(row) for row in rows if row["candidate"] == DEFAULT
    }
    compared = []
    for row in rows:
        summary: dict[str, Any] = {
            name: row[name] for name in (*_CELL, "candidate", *_SCORE)
        }
        reference = defaults.get(cell_of(row))
        if reference is not None:
            compare = compare_nats if row["task"] == PERPLEXITY else compare_answers
            comparison = compare(values_of(row), reference)
            summary |= asdict(comparison)
            summary["p_value"] = f"{comparison.p_value:.3g}"
        compared.append(summary)
    return compared


def write_summary(folder: Path, rows: list[dict[str, str]]) -> None:
    with (folder / "ablation_summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, SUMMARY_FIELDS)
        writer.writeheader()
        writer.writerows(summarise(rows))


def run(
    judge: Judge, table: Table, settings: Sequence[Setting], deadline: float
) -> None:
    """Run what the table lacks, and stop before the deadline.

    Args:
        judge: Runs a setting.
        table: What is known.
        settings: In this order.
        deadline: In the seconds of `time.monotonic`.
    """
    done = {tuple(row[name] for name in _SETTING) for row in table.rows()}
    todo = [s for s in settings if tuple(map(str, s.columns().values())) not in done]
    longest = 0.0
    for setting in tqdm(todo, unit="cell", mininterval=10):
        started = time.monotonic()
        if started + longest > deadline:
            break
        values = judge.values(setting.keep, setting.cell, setting.phase)
        seconds = time.monotonic() - started
        longest = max(longest, seconds)
        metric = PERPLEXITY if setting.cell.task == PERPLEXITY else "accuracy"
        interval = intervals.score(metric, tuple(values))
        table.append(
            setting.columns()
            | {k: round(v, 4) for k, v in zip(_SCORE, interval, strict=True)}
            | {"seconds": round(seconds, 2)}
            | {"values": " ".join(f"{value:.6g}" for value in values)}
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="Hugging Face folder; default: SmolLM2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="a torch type")
    parser.add_argument("--time-limit", type=float, default=float("inf"))
    parser.add_argument("--part", default="1/1", help="K/N: every Nth from the Kth on")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--screen", action="store_true")
    what.add_argument("--confirm", nargs="+", choices=CANDIDATES, metavar="NAME")
    what.add_argument("--list", action="store_true", help="name the candidates")
    return parser.parse_args()


def main() -> None:
    """Run one share of a phase, then compare all that is known."""
    started = time.monotonic()
    arguments = parse_arguments()
    if arguments.list:
        print("\n".join(CANDIDATES))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = arguments.model or str(smollm2_path())
    table = Table(arguments.out / "ablation.csv")
    phase, names = SCREEN, list(CANDIDATES)
    if arguments.confirm:
        phase, names = CONFIRM, [DEFAULT, *arguments.confirm]
    part, parts = map(int, arguments.part.split("/"))
    settings = [
        Setting(phase, Path(model).name, arguments.dtype, CANDIDATES[name], cell)
        for name in list(dict.fromkeys(names))[part - 1 :: parts]
        for cell in phase.cells
    ]
    judge = Judge(model, arguments.device, getattr(torch, arguments.dtype))
    run(judge, table, settings, started + arguments.time_limit)
    write_summary(arguments.out, table.rows())


if __name__ == "__main__":
    main()
