# SPDX-License-Identifier: Apache-2.0
"""An estimate counts what cells read and write, and the engines they need."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.quality.cells import PERPLEXITY, Cell
from benchmarks.quality.estimate import ANSWER_TOKENS, Pace, cells_of_vllm, work_of
from benchmarks.quality.grid import DEFAULT, FULL, setup_of
from benchmarks.quality.presets import PRESETS

CELL = Cell(task="vt", context=4096, n=10, seed=1, model="m", setup=FULL)


@pytest.mark.parametrize(
    ("task", "read", "written"),
    [
        ("vt", 4096, ANSWER_TOKENS),
        (PERPLEXITY, 4096, 0),
        # the second question is asked with the first text
        ("multikey, 2 questions", 2 * 4096, 2 * ANSWER_TOKENS),
        # what was written is read again
        ("needle, later", 2 * 4096 + 1024, ANSWER_TOKENS + 1024),
        ("derivation", 819, 4096 - 819),
    ],
)
def test_what_a_cell_reads_and_writes(task: str, read: int, written: int) -> None:
    work = work_of([replace(CELL, task=task)])
    assert (work.read, work.written, work.engines) == (10 * read, 10 * written, 1)


def test_time_is_that_of_engines_and_tokens() -> None:
    roco = replace(CELL, setup=setup_of(DEFAULT, 1024, 256, 512))
    work = work_of([CELL, roco])
    assert work.engines == 2
    pace = Pace(start=20, read=40_960, written=1_280)
    assert work.seconds(pace) == pytest.approx(2 * 20 + 2 + 2)


def test_only_cells_of_vllm_are_counted() -> None:
    found = cells_of_vllm(PRESETS["hard"])
    assert {cell.setup.engine for cell in found} == {"vllm"}
    assert any(cell.setup == FULL for cell in found)
