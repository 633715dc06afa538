# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures come from CSV files, each row beside its own baseline."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.serving import prefill, serve_workloads
from benchmarks.serving.comparisons import comparisons
from benchmarks.serving.plots import plot
from benchmarks.serving.report import drawn, fill, tables
from benchmarks.serving.session import MACHINE
from benchmarks.serving.table import rows_of
from benchmarks.serving.workloads import runs

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
MOST_BYTES = 150 * 1024
Row = dict[str, object]


def write(path: Path, columns: list[str], rows: list[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def served(name: str, commit: str, **speeds: float) -> list[Row]:
    """Return rows of a workload, with each variant's tokens a second."""
    return [
        {
            "gpu": "a GPU",
            "vllm": "1.2.3",
            "commit": commit,
            "flags": "",
            **run.columns,
            "output_tok_s": speed,
            "ttft_ms": 10,
            "tpot_ms": 2,
            "max_running": 8,
            "preemptions": 0,
        }
        for variant, speed in speeds.items()
        for run in runs(name, variants=[variant])
    ]


def serving_csv(folder: Path, rows: list[Row]) -> Path:
    columns = [*MACHINE, *serve_workloads.KEY, *serve_workloads.RESULTS]
    return write(folder / "serving.csv", columns, rows)


def test_a_row_counts_only_beside_a_baseline_of_its_own_commit(tmp_path: Path) -> None:
    path = serving_csv(
        tmp_path,
        [
            *served("batch-1", "old", stock=100, roco=90),
            *served("batch-1", "new", roco=999),
        ],
    )
    found = comparisons(rows_of(path))
    assert [list(each.rows) for each in found] == [["FLASH_ATTN", "roco"]] * 2
    assert [each.ratio("roco") for each in found] == [0.9, 0.9]


def test_the_newest_comparison_counts(tmp_path: Path) -> None:
    path = serving_csv(
        tmp_path,
        [
            *served("no-pressure", "old", stock=100, roco=90),
            *served("no-pressure", "new", roco=50, stock=100),
            *served("no-pressure", "new", roco=98),
        ],
    )
    (found,) = comparisons(rows_of(path))
    assert list(found.rows) == ["FLASH_ATTN", "roco"]
    assert found.ratio("roco") == pytest.approx(0.98)


def test_report(tmp_path: Path) -> None:
    rows = served("r-kv-stress", "abc", stock=100, recent=150, roco=148)
    rows += served("r-kv-stress", "abc", **{"stock-fp8": 120})
    serving_csv(tmp_path, rows)
    times = {"iterations": 5, "ttft_low_ms": 9, "ttft_high_ms": 31}
    cases = prefill.cases([512, 1024])
    write(
        tmp_path / "prefill.csv",
        [*MACHINE, *prefill.KEY, *prefill.RESULTS],
        [
            {
                **{column: "x" for column in MACHINE},
                **case.columns(number),
                **times,
                "ttft_ms": 10 * number * (3 if case.policy else 2),
            }
            for case in cases
            for number in (1, 2)
        ],
    )
    found = tables(tmp_path)
    assert list(found) == ["r-kv-stress", "throughput", "prefill"]
    text = " ".join("".join(found.values()).split())
    assert "FLASH_ATTN, fp8 KV cache | 120 | 1.200 |" in text
    assert "| 50 % | 100 (1.00) | 120 (1.20) | 150 (1.50) | 148 (1.48) |" in text
    assert "| roco | 148 | 1.480 | 10 | 2.00 | 8 | 0 |" in text
    assert "| 1 x 16384 | roco | 2048 | 1024 | 45.0 (9.0 to 31.0) | 1.500 | 2 |" in text


def test_fill() -> None:
    page = "a\n<!-- table: {} -->\n{}<!-- end -->\nb\n"
    old, new = page.format("prefill", "old\n"), page.format("prefill", "\nnew\n\n")
    assert fill(old, {"prefill": "new\n"}, pictures=[]) == new
    missing = page.format("prefill", "\nNot measured yet.\n\n")
    assert fill(new, {}, pictures=["prefill"]) == missing
    with_picture = fill(new, {"prefill": "new\n"}, pictures=["prefill"])
    assert "(pictures/prefill.svg)\n\nnew\n" in with_picture
    with pytest.raises(ValueError, match="'prefil'; use one of batch-1, crossover"):
        fill(page.format("prefil", ""), {}, pictures=[])


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_the_pages_show_the_tables(name: str) -> None:
    page = REPOSITORY / name
    text = page.read_text()
    assert fill(text, tables(RESULTS), drawn(page)) == text, (
        f"run python -m benchmarks.serving report --write {name}"
    )


def test_pictures(tmp_path: Path) -> None:
    serving_csv(
        tmp_path,
        served("r-kv-stress", "abc", stock=100, recent=150, roco=148)
        + served("crossover", "abc", stock=100, roco=150),
    )
    for name in ("decode_attention.csv", "memory.csv", "memory_steps.csv"):
        (tmp_path / name).write_bytes((RESULTS / name).read_bytes())
    files = plot(tmp_path, tmp_path / "pictures")
    names = {"throughput", "crossover", "decode_ratio", "resident_tokens"}
    assert {file.stem for file in files} == names
    assert len(files) == 2 * len(names)
    assert all(0 < file.stat().st_size < MOST_BYTES for file in files)


def test_no_pictures_without_rows(tmp_path: Path) -> None:
    assert plot(tmp_path, tmp_path) == []
