# SPDX-License-Identifier: Apache-2.0
"""Tables of results keep every row and know which ones they have."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from benchmarks.machine import environment
from benchmarks.rows import Table, keep, matching, note, noted, read, write
from benchmarks.serving.jobs import Session

SQUARES = Table("squares", key=["size"], results=["area"])


def session(out: Path, *, commit: str = "abc", time_limit: float = 60) -> Session:
    facts = {"gpu": "a GPU", "vllm": "1.2.3", "commit": commit, "flags": ""}
    return Session(out=out, facts=facts, time_limit=time_limit)


def measure(session: Session, sizes: list[int]) -> list[int]:
    """Measure a square for each size; return the sizes that were measured."""
    measured: list[int] = []

    def square(size: int) -> Mapping[str, object]:
        if size < 0:
            raise ValueError("negative")
        measured.append(size)
        return {"area": size * size}

    job = [({"size": size}, partial(square, size)) for size in sizes]
    session.run(SQUARES, [job])
    return measured


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    assert measure(session(tmp_path), [1, 2]) == [1, 2]
    assert measure(session(tmp_path), [1, 2, 3]) == [3]
    rows = read(tmp_path / "squares.csv")
    assert rows["size"].tolist() == [1, 2, 3]
    assert rows["area"].tolist() == [1, 4, 9]
    assert rows["commit"].tolist() == ["abc"] * 3
    # what made them is told once
    assert len(noted(tmp_path)["squares"]) == 1


def test_other_code_is_measured_anew(tmp_path: Path) -> None:
    measure(session(tmp_path), [1])
    assert measure(session(tmp_path, commit="def"), [1]) == [1]


def test_nothing_begins_after_the_limit(tmp_path: Path) -> None:
    assert measure(session(tmp_path, time_limit=-1), [1]) == []


def test_a_failure_costs_no_other_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(session(tmp_path), [-1, 2]) == [2]
    assert "negative" in capsys.readouterr().err


def test_other_columns_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "squares.csv").write_text("size,volume\n")
    with pytest.raises(ValueError, match=r"volume.*Move it away"):
        measure(session(tmp_path), [1])


def test_values_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Compared as text, a table would miss 0.30 for 0.3, and take 1e5 for a number."""
    path = tmp_path / "t.csv"
    table = Table("t", key=["commit", "share", "budget"], results=["speed"])
    table.append(tmp_path, {"commit": "1e5", "share": 0.3, "speed": 0.1 + 0.2})
    table.append(tmp_path, {"commit": "70", "share": 1, "budget": 2048, "speed": 2})
    frame = read(path)
    assert frame["commit"].tolist() == ["1e5", "70"]
    assert frame["speed"].tolist() == [0.1 + 0.2, 2]
    assert frame["budget"].isna().tolist() == [True, False]
    assert frame["budget"][1] == 2048
    assert table.has(tmp_path, {"commit": "1e5", "share": 0.30, "budget": None})
    assert not table.has(tmp_path, {"commit": "1e5", "share": 0.3, "budget": 2048})
    assert len(matching(frame, commit="70", budget=2048.0)) == 1
    write(tmp_path / "again.csv", frame)
    assert read(tmp_path / "again.csv").equals(frame)


def test_rows_of_another_folder_are_kept(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, batch in ((here, 1), (there, 2)):
        for name in ("prefill", "eviction"):
            write(folder / f"{name}.csv", [{"batch": batch, "ttft_ms": 5}])
            note(folder, name, {"batch": batch})
    keep(there, here, growing=["prefill"])
    assert read(here / "prefill.csv")["batch"].tolist() == [1, 2]
    assert noted(here)["prefill"] == [{"batch": 1}, {"batch": 2}]
    assert read(here / "eviction.csv")["batch"].tolist() == [2]

    write(there / "prefill.csv", [{"batch": 3, "seconds": 5}])
    with pytest.raises(ValueError, match="seconds.*start a new table"):
        keep(there, here, growing=["prefill"])


def test_a_command_names_no_folder_of_who_called_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["x", "memory", "--out", "s", "--model", "/h/m", "-q"]
    )
    command = environment()["command"]
    assert command.endswith(" memory --out DIR --model DIR -q")
