# SPDX-License-Identifier: Apache-2.0
"""What entries are worth to outputs, against leaving each of them out."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.oracle.output_peaks import OutputPeaks
from benchmarks.quality.oracle.step import make_step

UNIT = 4
ENTRIES = 4
COLUMNS = ENTRIES * UNIT
QUERIES = 6


@pytest.mark.parametrize("name", ["error", "output"])
def test_equal_what_is_lost_without_an_entry(name: str) -> None:
    """Two sequences of which the second reads less, two kv heads of three queries."""
    generator = torch.Generator().manual_seed(0)
    counts = [QUERIES, QUERIES - 2]
    step = make_step(
        [10, 12], counts, [10, 12], unit=UNIT, capacity=64, device=torch.device("cpu")
    )
    assert step.columns == COLUMNS
    logits = torch.randn(2, 2, 3, QUERIES, COLUMNS, generator=generator)
    logits.masked_fill_(~step.visible[:, None, None], -torch.inf)
    values = torch.randn(2, 2, COLUMNS, 8, generator=generator)
    probabilities = logits.softmax(-1)
    output = torch.einsum("nhgqt,nhtd->nhgqd", probabilities, values)
    peaks = OutputPeaks(name, UNIT, (1, 2, 2, ENTRIES + 1), torch.device("cpu"))
    peaks.add(0, step, probabilities, values, output)

    for entry in range(ENTRIES):
        inside = torch.arange(COLUMNS) // UNIT == entry
        if name == "output":
            part = probabilities * inside
            lost = torch.einsum("nhgqt,nhtd->nhgqd", part, values)
        else:
            rest = logits.masked_fill(inside, -torch.inf).softmax(-1)
            lost = output - torch.einsum("nhgqt,nhtd->nhgqd", rest, values)
        worth = lost.norm(dim=-1).mean(2)
        worth = worth.masked_fill(~step.real[:, None], 0)
        torch.testing.assert_close(peaks.peaks[0, ..., entry], worth.amax(-1))
    assert (peaks.peaks[..., ENTRIES] == 0).all()

    before = peaks.peaks.clone()
    peaks.add(0, step, probabilities / 2, values, output / 2)
    assert (peaks.peaks >= before).all(), "a peak never falls"


def test_entries_that_stay_keep_theirs() -> None:
    peaks = OutputPeaks("error", UNIT, (1, 1, 1, 4), torch.device("cpu"))
    peaks.peaks[:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    entries = torch.tensor([1, 3])[None, None, None]
    peaks.keep(entries, torch.ones(1, 1, 2, dtype=torch.bool))
    assert peaks.peaks.flatten().tolist() == [2.0, 4.0, 0.0, 0.0]
