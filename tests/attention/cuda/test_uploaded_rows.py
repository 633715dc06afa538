# SPDX-License-Identifier: Apache-2.0
"""Rows reach the device when they change, and only then."""

from __future__ import annotations

import torch

from vllm_roco.attention.cuda.uploaded_rows import UploadedRows
from vllm_roco.eviction_row import NUM_ROW_FIELDS, EvictionRow

DEFAULT = EvictionRow(8, 2, 100, 16, 32, 5, 0, 0)


def rows(*budgets: int) -> torch.Tensor:
    own = [DEFAULT._replace(resident_blocks=budget) for budget in budgets]
    return torch.tensor(own, dtype=torch.int32)


def test_the_buffer_holds_the_steps_rows() -> None:
    buffer = torch.zeros(4, NUM_ROW_FIELDS, dtype=torch.int32)
    uploaded = UploadedRows(buffer, DEFAULT)
    assert buffer[:, 0].tolist() == [8, 8, 8, 8]
    uploaded.set(rows(1, 2, 3))
    assert buffer[:, 0].tolist() == [1, 2, 3, 8]
    # a smaller batch, then the same requests in another order
    uploaded.set(rows(3, 1))
    assert buffer[:2, 0].tolist() == [3, 1]
    # in a batch without options nothing of theirs is left
    uploaded.set(None)
    assert torch.equal(buffer, rows(8, 8, 8, 8))


def test_a_buffer_of_the_profiling_run_can_be_written() -> None:
    with torch.inference_mode():
        buffer = torch.zeros(2, NUM_ROW_FIELDS, dtype=torch.int32)
    uploaded = UploadedRows(buffer, DEFAULT)
    uploaded.set(rows(1, 2))
    assert buffer[:, 0].tolist() == [1, 2]
    uploaded.set(None)
    assert buffer[:, 0].tolist() == [8, 8]


def test_what_has_not_changed_is_not_brought_again() -> None:
    buffer = torch.zeros(2, NUM_ROW_FIELDS, dtype=torch.int32)
    uploaded = UploadedRows(buffer, DEFAULT)
    buffer.fill_(-1)
    uploaded.set(None)
    assert (buffer == -1).all()
    uploaded.set(rows(1, 2))
    buffer.fill_(-1)
    uploaded.set(rows(1, 2))
    assert (buffer == -1).all()
    uploaded.set(rows(2, 1))
    assert buffer[:, 0].tolist() == [2, 1]
