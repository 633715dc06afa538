# SPDX-License-Identifier: Apache-2.0
"""Live tables and batches, from lengths and block tables alone."""

from __future__ import annotations

import pytest
import torch

from vllm_roco.attention.cpu import metadata
from vllm_roco.attention.cpu.metadata import Batch, Sequence, batches_of, sequences_of
from vllm_roco.eviction_row import EvictionRow
from vllm_roco.eviction_schedule import NEVER

# B 2, S 1: blocks go at 12, 16, 20, ... tokens
SIZE = 4
ROW = EvictionRow(2, 1, NEVER, 0, 0, 0, 0, 0)


def sequences(
    queries: list[int], lengths: list[int], rows: list[EvictionRow] | None = None
) -> list[Sequence]:
    """Return the rows of a batch whose block ids are 100 * row + logical block."""
    starts = [0]
    for num_queries in queries:
        starts.append(starts[-1] + num_queries)
    table = torch.arange(20, dtype=torch.int32) + 100 * torch.arange(
        len(lengths), dtype=torch.int32
    ).unsqueeze(1)
    rows = rows or [ROW] * len(lengths)
    return list(sequences_of(starts, lengths, table, rows, SIZE))


@pytest.mark.parametrize(
    ("queries", "length", "live", "before", "after"),
    [
        pytest.param(1, 1, [0], 0, 0, id="first token"),
        pytest.param(4, 4, [0], 0, 0, id="a full block"),
        pytest.param(1, 5, [0, 1], 0, 0, id="a new block"),
        pytest.param(1, 11, [0, 1, 2], 0, 0, id="before the first eviction"),
        pytest.param(1, 12, [0, 1, 2], 0, 1, id="the first eviction"),
        pytest.param(1, 13, [0, 1, 3], 1, 1, id="behind the first gap"),
        pytest.param(1, 16, [0, 1, 3], 1, 2, id="the second eviction"),
        pytest.param(17, 17, [0, 1, 2, 3, 4], 0, 2, id="a prompt over two strides"),
        pytest.param(5, 22, [0, 1, 4, 5], 2, 3, id="a chunk"),
    ],
)
def test_the_live_table_is_the_home_and_what_arrived_behind_the_gap(
    queries: int, length: int, live: list[int], before: int, after: int
) -> None:
    (sequence,) = sequences([queries], [length])
    assert sequence.live_blocks.tolist() == live
    assert sequence.live_blocks.dtype == torch.int64
    assert (sequence.evicted_before, sequence.evicted_after) == (before, after)
    assert (sequence.num_tokens, sequence.num_queries) == (length, queries)


def test_rows_without_queries_are_left_out() -> None:
    first, second = sequences([3, 0, 1, 0], [3, 0, 13, 9])
    assert (first.first_token, second.first_token) == (0, 3)
    assert second.live_blocks.tolist() == [200, 201, 203]


def test_new_blocks_are_those_that_get_their_first_token() -> None:
    # 13 tokens known, 9 come: the block of tokens 12 to 15 is not new
    (sequence,) = sequences([9], [22])
    batch = Batch.of([sequence], SIZE)
    assert batch.table.tolist() == [[0, 1, 3, 4, 5]]
    assert batch.is_new.tolist() == [[False, False, False, True, True]]
    assert batch.first_positions[batch.is_new].tolist() == [16, 20]
    assert batch.live_tokens.tolist() == [18]


def test_a_first_prompt_is_all_new() -> None:
    (sequence,) = sequences([9], [9])
    batch = Batch.of([sequence], SIZE)
    assert batch.is_new.all()
    assert batch.first_positions.tolist() == [[0, 4, 8]]


def test_a_batch_is_padded_to_its_longest_row() -> None:
    batch = Batch.of(sequences([1, 1, 1], [13, 1, 8]), SIZE)
    assert batch.tokens.tolist() == [[0], [1], [2]]
    assert batch.table.tolist() == [[0, 1, 3], [100, 0, 0], [200, 201, 0]]
    assert batch.is_live.tolist() == [
        [True, True, True],
        [True, False, False],
        [True, True, False],
    ]
    assert batch.live_tokens.tolist() == [9, 1, 8]
    assert batch.is_new.tolist() == [
        [False, False, True],
        [True, False, False],
        [False, False, False],
    ]
    assert batch.first_positions[0, 2] == 12


def test_prompts_stay_alone_and_decodes_go_together() -> None:
    batches = batches_of(sequences([1, 5, 1, 3, 1], [6, 5, 11, 7, 2]), SIZE)
    assert [batch.tokens.tolist() for batch in batches] == [
        [[1, 2, 3, 4, 5]],
        [[7, 8, 9]],
        # the longest first
        [[6], [0], [10]],
    ]


@pytest.mark.parametrize(("max_tokens", "sizes"), [(1, [1] * 4), (24, [2, 2])])
def test_decodes_are_split_by_the_keys_that_they_gather(
    max_tokens: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "MAX_BATCH_TOKENS", max_tokens)
    batches = batches_of(sequences([1] * 4, [12, 5, 9, 8]), SIZE)
    assert [len(batch.tokens) for batch in batches] == sizes
    for batch in batches:
        assert batch.table.numel() * SIZE <= max(max_tokens, 12)


def test_nothing_to_do_makes_no_batch() -> None:
    assert batches_of(sequences([0], [0]), SIZE) == []


def test_every_row_has_its_own_arithmetic() -> None:
    """The same length: one block kept of 4, none evicted, and none after 12 tokens."""
    rows = [ROW, ROW._replace(until=0), ROW._replace(until=12)]
    found = sequences([1] * 3, [17] * 3, rows)
    assert [sequence.row for sequence in found] == rows
    assert [sequence.evicted_before for sequence in found] == [2, 0, 1]
    assert [sequence.live_blocks.tolist() for sequence in found] == [
        [0, 1, 4],
        [100, 101, 102, 103, 104],
        [200, 201, 203, 204],
    ]
    batch = Batch.of(found, SIZE)
    assert batch.first_positions[batch.is_new].tolist() == [16, 16, 16]
    assert batch.live_tokens.tolist() == [9, 17, 13]


def test_only_rows_that_may_still_evict_are_measured() -> None:
    rows = [ROW, ROW._replace(until=0), ROW._replace(until=12)]
    for length, measured in (12, [True, False, True]), (13, [True, False, False]):
        found = sequences([1] * 3, [length] * 3, rows)
        batch = Batch.of(found, SIZE)
        for row, is_measured in enumerate(measured):
            expected = batch.is_live[row] & is_measured
            assert batch.is_measured[row].tolist() == expected.tolist()
