# SPDX-License-Identifier: Apache-2.0
"""What the pages show is what the CSV files hold."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest

from benchmarks.__main__ import FOLDER, PAGES, PICTURES, REPOSITORY, tables
from benchmarks.markdown import fill
from benchmarks.rows import RESULTS

MOST_BYTES = 150 * 1024


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_show_the_tables(name: str) -> None:
    text = (REPOSITORY / name).read_text()
    assert fill(text, tables(RESULTS)) == text, (
        "run python -m benchmarks report --write"
    )


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_show_the_rows(name: str, tmp_path: Path) -> None:
    """A picture names the files that it was drawn from, and a hash of each."""
    kept, drawn = FOLDER / f"{name}.svg", tmp_path / f"{name}.svg"
    if not all((RESULTS / f"{table}.csv").exists() for table in PICTURES[name].tables):
        assert not kept.exists(), "a picture of rows that are not kept"
        return
    assert kept.stat().st_size < MOST_BYTES
    assert f">{PICTURES[name].source(RESULTS)}<" in kept.read_text(), (
        "run python -m benchmarks plot"
    )
    assert PICTURES[name].write(RESULTS, drawn)
    if f"Matplotlib v{matplotlib.__version__}," in kept.read_text():
        # another release draws the same in other words
        assert drawn.read_bytes() == kept.read_bytes(), "run python -m benchmarks plot"


def test_every_picture_is_shown_and_every_shown_one_is_there() -> None:
    shown: set[Path] = set()
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")):
        found = re.findall(r"!\[.*\]\((.*pictures/.*)\)", page.read_text())
        shown |= {(page.parent / link).resolve() for link in found}
    assert shown == set(FOLDER.iterdir())


def test_places_are_filled_again_and_again() -> None:
    page = "a\n<!-- table: prefill -->\n{}<!-- end -->\nb\n"
    filled = page.format("\nnew\n\n")
    for text in (page.format(""), page.format("old\n"), filled):
        assert fill(text, {"prefill": "new"}) == filled
    with pytest.raises(ValueError, match="'prefill'. Use one of eviction, profile"):
        fill(filled, {"profile": "", "eviction": ""})
