# SPDX-License-Identifier: Apache-2.0
"""One step of a batch: which tokens are read, where their keys go, who sees what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Step:
    """Tensors that describe one forward pass.

    Sequences may read different numbers of tokens. A row's tokens are its last columns,
    so that the last column is every row's newest token; what comes before is padding,
    which sees one key, is seen by nobody and is not measured.

    Attributes:
        width: `q`, the most tokens that a sequence reads.
        columns: Slots that are attended, a multiple of the entry's size.
        start: `[n]` int64, tokens computed before.
        count: `[n]` int64, tokens read.
        positions: `[n, q]` int64, 0 for padding.
        slots: `[n, q]` int64, where keys and values go; the last slot for padding.
        visible: `[n, q, columns]` bool.
        real: `[n, q]` bool, false for padding.
    """

    width: int
    columns: int
    start: torch.Tensor
    count: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    visible: torch.Tensor
    real: torch.Tensor


def make_step(
    starts: Sequence[int],
    counts: Sequence[int],
    live: Sequence[int],
    *,
    unit: int,
    capacity: int,
    device: torch.device,
) -> Step:
    """Lay out a step.

    Args:
        starts: Tokens of each sequence computed before.
        counts: Tokens that each reads, 0 or more.
        live: Slots of each in use.
        unit: Tokens of an entry.
        capacity: Slots there are; the last is nobody's.
        device: Where the tensors go.
    """
    width = max(counts)
    used = max(slots + count for slots, count in zip(live, counts, strict=True))
    columns = -(-used // unit) * unit
    assert columns < capacity
    start, count, in_use = torch.tensor([starts, counts, live]).to(device)
    # the token's number within its row's step, negative for padding
    number = torch.arange(width, device=device) - (width - count)[:, None]
    real = number >= 0
    slots = in_use[:, None] + number
    visible_slots = slots.clamp_min(0)[..., None].where(real[..., None], 0)
    return Step(
        width=width,
        columns=columns,
        start=start,
        count=count,
        positions=(start[:, None] + number).where(real, 0),
        slots=slots.where(real, capacity - 1),
        visible=torch.arange(columns, device=device) <= visible_slots,
        real=real,
    )
