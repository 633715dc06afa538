# SPDX-License-Identifier: Apache-2.0
"""Tables of results keep every row and know which ones they have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from benchmarks.serving.keep import keep
from benchmarks.serving.session import MACHINE, Plan, Session
from benchmarks.serving.table import Table, rows_of


def session(
    out: Path, *, commit: str = "abc", time_limit: float = 60, again: bool = False
) -> Session:
    facts = {"gpu": "a GPU", "vllm": "1.2.3", "commit": commit, "flags": ""}
    return Session(out=out, facts=facts, time_limit=time_limit, again=again)


def work_off(session: Session, sizes: list[int]) -> list[int]:
    """Measure a square for each size; return the sizes that were measured."""
    measured: list[int] = []

    def square(size: int) -> Mapping[str, object]:
        if size < 0:
            raise ValueError("negative")
        measured.append(size)
        return {"area": size * size}

    session.work_off(
        Plan(
            name="squares",
            key=["size"],
            results=["area"],
            engines=[[({"size": size}, partial(square, size)) for size in sizes]],
        )
    )
    return measured


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    assert work_off(session(tmp_path), [1, 2]) == [1, 2]
    assert work_off(session(tmp_path), [1, 2, 3]) == [3]
    rows = rows_of(tmp_path / "squares.csv")
    assert [(row["size"], row["area"], row["commit"]) for row in rows] == [
        ("1", "1", "abc"),
        ("2", "4", "abc"),
        ("3", "9", "abc"),
    ]


def test_other_code_is_measured_anew(tmp_path: Path) -> None:
    work_off(session(tmp_path), [1])
    assert work_off(session(tmp_path, commit="def"), [1]) == [1]


def test_again(tmp_path: Path) -> None:
    work_off(session(tmp_path), [1])
    assert work_off(session(tmp_path, again=True), [1]) == [1]


def test_nothing_begins_after_the_limit(tmp_path: Path) -> None:
    assert work_off(session(tmp_path, time_limit=-1), [1]) == []


def test_a_failure_costs_no_other_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert work_off(session(tmp_path), [-1, 2]) == [2]
    assert "negative" in capsys.readouterr().err


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "squares.csv"
    path.write_text("size,volume\n")
    with pytest.raises(ValueError, match=r"volume.*Move it away"):
        Table(path, key=[*MACHINE, "size"], results=["area"])


def test_rows_of_another_folder_are_kept(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, batch in ((here, "1"), (there, "2")):
        folder.mkdir()
        (folder / "prefill.csv").write_text(f"batch,ttft_ms\n{batch},5\n")
        (folder / "prefill.json").write_text(f'[{{"batch": {batch}}}]')
        (folder / "eviction.csv").write_text(f"rows\n{batch}\n")
    keep(there, here)
    assert [row["batch"] for row in rows_of(here / "prefill.csv")] == ["1", "2"]
    assert json.loads((here / "prefill.json").read_text()) == [
        {"batch": 1},
        {"batch": 2},
    ]
    assert rows_of(here / "eviction.csv") == [{"rows": "2"}]

    (there / "prefill.csv").write_text("batch,seconds\n3,5\n")
    with pytest.raises(ValueError, match="seconds.*start a new table"):
        keep(there, here)
