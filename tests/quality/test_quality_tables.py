# SPDX-License-Identifier: Apache-2.0
"""Plots and the report come from a table, and say what it says."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.markdown import UNMEASURED
from benchmarks.quality import grid, scoring
from benchmarks.quality.cells import GENERATION, PERPLEXITY, PERPLEXITY_GENERATION, Cell
from benchmarks.quality.grid import FULL, METHODS, ORACLE_METHODS, cells
from benchmarks.quality.pictures import PICTURES
from benchmarks.quality.policies import BASE
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.results import Result
from benchmarks.quality.scores import label_of, named
from benchmarks.quality.tables import search, tables, verdicts
from benchmarks.quality.worker import accuracies
from benchmarks.rows import note, write

FAILED = ("niah_multikey_2", "niah_multikey_3", "vt", "cwe")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the full preset with made-up outcomes of four problems a cell.

    At half of the context half of the problems are solved; the full cache solves all
    of them, and none of some tasks.
    """
    results = {
        cell: Result(cell, made_up(cell), "a GPU", "abc")
        for cell in cells(PRESETS["full"], model="m", seed=50_000, n=4)
        if cell.setup == FULL or cell.task not in FAILED
    }
    folder = tmp_path_factory.mktemp("measured")
    write(folder / "quality.csv", scoring.rows(results))
    note(folder, "quality", {"base": asdict(grid.BASE)})
    return folder


Row = dict[str, object]


def made_up(cell: Cell) -> dict[str, list[float]]:
    ratio = cell.budget_ratio
    if cell.task in (PERPLEXITY, PERPLEXITY_GENERATION):
        return {"perplexity": [3.0 - ratio] * 4}
    if cell.task == GENERATION:
        metrics = ("agreement", "divergence", "perplexity")
        return {metric: [ratio] * 4 for metric in metrics}
    if cell.task in FAILED:
        return {"accuracy": [0.0] * 4}
    return {"accuracy": [float(i < 4 * ratio) for i in range(4)]}


def test_the_picture_names_every_method_and_no_failed_task(
    measured: Path, tmp_path: Path
) -> None:
    path = tmp_path / "budget.svg"
    assert PICTURES["quality_budget"].write(measured, path)
    text = path.read_text()

    for method in ("full cache", *METHODS, *ORACLE_METHODS):
        assert method in text
    assert "passkey, 4,096 tokens" in text
    assert not any(f"{task}, 2,048" in text for task in FAILED)


def test_hard_tasks_are_shown_with_every_question(tmp_path: Path) -> None:
    measured = [
        cell
        for cell in cells(PRESETS["hard"], model="m", seed=50_000, n=2)
        if cell.task in ("vt", "needle, 2 questions") and cell.context == 2048
    ]
    results = {
        cell: Result(
            cell,
            {"accuracy": [0.4, 0.8]}
            if cell.task == "vt"
            else accuracies([[1.0, 0.0], [1.0, 1.0]]),
            "gpu",
            "abc",
        )
        for cell in measured
    }
    write(tmp_path / "hard.csv", scoring.rows(results))
    text = re.sub(" +", " ", tables(tmp_path)["quality_hard"])

    assert "**vt 2,048**, n = 2, full cache 0.60 [0.40, 0.80]" in text
    assert "| roco/contribution, kept | 0.75 [0.50, 1.00] | 0.75 " in text
    line = (
        "| needle, 2 questions 2,048 | h2o, tokens | 25 % | 1.00 [0.34, 1.00] | 0.50 "
    )
    assert line in text
    assert PICTURES["quality_hard"].write(tmp_path, tmp_path / "hard.svg")
    picture = (tmp_path / "hard.svg").read_text()
    assert ">vt 2,048 tokens<" in picture
    assert ">h2o, tokens<" in picture
    assert "questions" not in picture


def test_paces_are_shown_with_their_mean(tmp_path: Path) -> None:
    measured = cells(PRESETS["pace"], model="m", seed=50_000, n=4)
    lacking = [
        cell
        for cell in measured
        if (cell.task, cell.setup.method, cell.setup.budget) != ("vt", "512", 1280)
    ]
    results = {
        cell: Result(cell, {"accuracy": [float(cell.task == "vt")] * 4}, "gpu", "abc")
        for cell in lacking
    }
    write(tmp_path / "pace.csv", scoring.rows(results))
    text = re.sub(" +", " ", tables(tmp_path)["quality_pace"])

    assert "**At most 768 tokens in a step**, n = 4" in text
    least, most = text.split("**At most 1,280")
    assert re.search(r"\| long where easy \|( [01]\.00 \[.*?\] \|){5} 0\.20 \|", least)
    assert re.search(r"\| full cache \|.* 0\.20 \|", most)
    assert re.search(r"\| 512 \|.*\| +\|\n", most), "no mean without a task"
    assert PICTURES["quality_pace"].write(tmp_path, tmp_path / "pace.svg")
    picture = (tmp_path / "pace.svg").read_text()
    assert all(f">{word}<" in picture for word in ("easy", "hard", "random", "512"))


def test_a_study_of_paces_shows_the_ends_of_each_kind(tmp_path: Path) -> None:
    measured = [
        {"text": text, "pace": pace, "chunk": 9, "steps": 3, "score": score}
        for text in ("mixed", "prose")
        for pace, score in (
            ("32", 0.7),
            ("64", 0.6),
            ("512", 0.5),
            ("random25", 0.4),
            ("entropy+", 0.3),
        )
    ]
    # not of both texts
    measured.append({**measured[0], "pace": "cheat+", "score": 1.0})
    for row in measured:
        row |= {"ci_low": 0.1, "ci_high": 0.9}
    write(tmp_path / "pace_study.csv", measured)
    text = re.sub(" +", " ", tables(tmp_path)["quality_pace_study"])

    lines = [line.split(" | ")[:3] for line in text.splitlines()[2:]]
    assert [(pace.strip("| "), score[:4]) for pace, _, score in lines] == [
        ("fixed: 32", "0.70"),
        ("fixed: 512", "0.50"),
        ("at random: random25", "0.40"),
        ("by a signal: entropy+", "0.30"),
    ]
    path = tmp_path / "study.svg"
    assert PICTURES["quality_pace_study"].write(tmp_path, path)
    assert "told where the needles are" in path.read_text()


def test_turns_have_a_line_for_each_side(tmp_path: Path) -> None:
    measured = [
        {
            "context": context,
            "budget": budget,
            "chunk": chunk,
            "turn_end_token_ids": ends,
            "answers": answers,
            "teller": teller,
        }
        | {"n": 8, "right": right, "score": right / 8, "ci_low": 0.1, "ci_high": 0.9}
        for context, right in ((2048, 6), (4096, 4))
        for budget, chunk, ends, answers, teller in (
            (0, 0, "", "", "assistant"),
            (0, 0, "", "", "user"),
            (1024, 1024, "model", "as written", "user"),
            (1024, 1024, "none", "read again", "user"),
            (1024, 256, "none", "read again", "user"),
        )
    ]
    # not measured to the end
    write(tmp_path / "turns.csv", measured[:-1])
    text = re.sub(" +", " ", tables(tmp_path)["quality_turns"])

    header, _, *lines = text.splitlines()
    assert header.endswith("| 2,048 tokens of prose | 4,096 tokens of prose |")
    both = "| 8 | 6: 0.75 [0.10, 0.90] | 4: 0.50 [0.10, 0.90] |"
    assert lines == [
        f"| user | full cache | | | {both}",
        f"| user | 1,024 | 1,024 | yes | as written {both}",
        f"| user | 1,024 | 1,024 | no | read again {both}",
        "| user | 1,024 | 256 | no | read again | 8 | 6: 0.75 [0.10, 0.90] | |",
        f"| assistant | full cache | | | {both}",
    ]


def test_names_tell_tokens_from_policies() -> None:
    """The oracle's h2o chooses tokens, the plugin's policy of this name blocks."""
    assert label_of("h2o") == "h2o, tokens"
    assert label_of("token-roco") == "token-roco"
    assert label_of("both, h2o", "vllm") == "both, policy h2o"
    assert label_of("recent, kept") == "recent, kept"
    assert label_of("roco/peak", "vllm") == "roco/peak"


def test_less_is_never_called_safer_than_more() -> None:
    """At the smallest budget only the easiest task was measured, and was solved."""
    safe, lossy, least = verdicts(pd.Series([1.0, 0.6, 0.99]))
    assert safe.startswith("safe")
    assert lossy == least != safe


def test_report_tells_scores_failures_and_a_choice(measured: Path) -> None:
    found = tables(measured)
    text = "\n".join(found.values())

    assert "| **roco/contribution** (default) | 0.50 [0.15, 0.85] " in re.sub(
        " +", " ", text
    )
    assert re.search(r"\| vt 2,048 +\| 0\.00 \[0\.00, 0\.49\] +\| 4 ", text)
    assert re.search(r"\| 50 % .*\| loses much", text)
    assert re.search(r"\| 25 % .*\| broken: do not serve", text)
    line = r"\| passkey 2,048 at 12\.5 % +\| {} +\| as the stride +\| 4 +\| 0\.25 \["
    default = r"\*\*roco/contribution\*\* \(default\)"
    for name, method in (("stride", default), ("stride_before", "roco/peak")):
        assert re.search(line.format(method), found[f"quality_{name}"])
    assert "peak" not in found["quality_stride"]
    # they have tables of their own
    missing = {name for name, text in found.items() if text == UNMEASURED}
    others = ("search", "kvpress", "modes", "windows", "fp8", "hard")
    added = ("written", "pace", "pace_study", "turns")
    assert missing == {f"quality_{name}" for name in (*others, *added)}


def test_nothing_is_shown_of_nothing(tmp_path: Path) -> None:
    assert set(tables(tmp_path).values()) == {UNMEASURED}
    for name, picture in PICTURES.items():
        assert not picture.write(tmp_path, tmp_path / f"{name}.svg")


def test_the_report_tells_what_differs_and_what_is_missing() -> None:
    def row(
        method: str, ratio: float, score: float, p_value: float
    ) -> dict[str, object]:
        return {
            "n": 64,
            "seed": 1000,
            "task": "needle",
            "context": 1024,
            "budget_ratio": ratio,
            "method": method,
            "score": score,
            "p_value": p_value,
        }

    rows = pd.DataFrame(
        [
            row(BASE, 0.25, 0.8, 1),
            row(BASE, 0.5, 0.9, 1),
            row("worse", 0.25, 0.2, 0.001),
            row("worse", 0.5, 0.85, 0.5),
            row("better", 0.25, 0.9, 0.04),
            row("better", 0.5, 0.91, 0.9),
            row("cut short", 0.5, 1, 0.001),
        ]
    )
    text = search(named(rows))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].endswith("1 more were not measured in every cell")
    assert lines[2] == "| change | needle 1,024, 50 % | needle 1,024, 25 % |"
    assert lines[4:] == [
        "| `better` | 0.91 | 0.90* |",
        f"| **{BASE}** | 0.90 | 0.80 |",
        "| `worse` | 0.85 | 0.20* |",
    ]
