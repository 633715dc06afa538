# SPDX-License-Identifier: Apache-2.0
"""Plots and the report come from a table, and say what it says."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.quality import running, table
from benchmarks.quality.cells import GENERATION, PERPLEXITY, PERPLEXITY_GENERATION, Cell
from benchmarks.quality.grid import BASE, FULL, PRESETS, cells
from benchmarks.quality.outcomes import Outcome
from benchmarks.quality.plots import draw
from benchmarks.quality.report import fill, markdown

ROOT = Path(__file__).parents[2]
FAILED = ("niah_multikey_2", "niah_multikey_3", "vt", "cwe")
PICTURES = ("quality_budget", "quality_perplexity", "quality_stride")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the full preset with made-up outcomes of four problems a cell.

    At half of the context half of the problems are solved; the full cache solves all
    of them, and none of some tasks.
    """
    outcomes = {
        cell: Outcome(cell, made_up(cell), "a GPU", "abc")
        for cell in cells(PRESETS["full"], model="m", seed=50_000, n=4)
        if cell.setup == FULL or cell.task not in FAILED
    }
    path = tmp_path_factory.mktemp("measured") / running.TABLE
    table.write(path, table.rows(outcomes))
    path.with_suffix(".json").write_text(json.dumps({"base": asdict(BASE)}))
    return path


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


def test_every_picture_is_drawn_small_and_the_same_again(
    measured: Path, tmp_path: Path
) -> None:
    files = draw(measured, tmp_path)

    assert {file.stem for file in files} == set(PICTURES)
    assert {file.suffix for file in files} == {".svg", ".png"}
    for file in files:
        assert 5_000 < file.stat().st_size < 150 * 1024
    again = draw(measured, tmp_path / "again")
    for one, other in zip(files, again, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_picture_names_every_method_and_no_failed_task(
    measured: Path, tmp_path: Path
) -> None:
    draw(measured, tmp_path)
    text = (tmp_path / "quality_budget.svg").read_text()

    preset = PRESETS["full"]
    for method in ("full cache", *preset.methods, *preset.oracle_methods):
        assert method in text
    assert "passkey, 4,096 tokens" in text
    assert not any(f"{task}, 2,048" in text for task in FAILED)


def test_report_tells_scores_failures_and_a_choice(measured: Path) -> None:
    text = markdown(measured)

    assert "| **roco/peak** (default) | 0.50 [0.15, 0.85] " in re.sub(" +", " ", text)
    assert "passkey 2,048: 1.00 in full, 0.50 at 50 %, 0.25 at 25 %" in text
    assert re.search(r"\| vt 2,048 +\| 0\.00 \[0\.00, 0\.49\] +\| 4 ", text)
    assert re.search(r"\| 50 % .*\| loses much", text)
    assert re.search(r"\| 25 % .*\| broken: do not serve", text)
    assert "passkey 2,048 at 12.5 %: 0.25 at 16, 0.25 at 32" in text


def test_documents_have_places_for_what_there_is(
    measured: Path, tmp_path: Path
) -> None:
    for name in ("README.md", "docs/quality.md"):
        document = tmp_path / Path(name).name
        document.write_text((ROOT / name).read_text())
        fill(document, measured)
        once = document.read_text()
        fill(document, measured)

        assert document.read_text() == once
        assert "roco/peak" in once
        # they have tables of their own
        others = sum(once.count(f"report: {name}") for name in ("ablation", "kvpress"))
        assert once.count("Not measured yet") == others


@pytest.mark.parametrize("name", ["README.md", "docs/quality.md"])
def test_the_pages_show_the_table(name: str, tmp_path: Path) -> None:
    page = ROOT / name
    document = tmp_path / page.name
    document.write_text(page.read_text())
    fill(document, ROOT / "benchmarks" / "results" / running.TABLE)
    assert document.read_text() == page.read_text(), (
        "run python -m benchmarks.quality report --out benchmarks/results "
        f"--into {name}"
    )


def test_a_place_for_what_there_is_not_is_refused(
    measured: Path, tmp_path: Path
) -> None:
    document = tmp_path / "document.md"
    document.write_text("<!-- report: nonsense -->\n<!-- end of report -->\n")

    with pytest.raises(ValueError, match="'nonsense', which is not one of source"):
        fill(document, measured)
