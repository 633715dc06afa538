# SPDX-License-Identifier: Apache-2.0
"""What one of several ranks reads and keeps, seen in its own process.

For each step a line of a file; `tests.soak.ranks` compares the lines of all ranks.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.soak.audit import Table
from tests.soak.rank_steps import Eviction, Step
from vllm_roco.attention.cpu import impl, metadata
from vllm_roco.eviction_row import SCORE_NONE, SCORE_RANDOM
from vllm_roco.kv_cache.page import (
    NUM_QUERIES,
    first_positions_view,
    statistics_view,
)

Blocks = list[int]


class RankAudit:
    """Looks into the block tables and the pages of a CPU worker.

    Args:
        path: Where to write to.
        request_ids: Returns those of the worker's batch, by row.
    """

    def __init__(self, path: Path, request_ids: Callable[[], list[str]]) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._request_ids = request_ids
        self._tables: dict[str, Table] = {}
        self._step: Step | None = None
        self._num_steps = 0
        # by their first token's place in the step
        self._requests: dict[int, str] = {}
        self._evict, self._sequences_of = impl.evict, metadata.sequences_of

    def watch(self) -> None:
        """Look at what the package does in this process from now on."""
        vars(impl)["evict"] = self.evict
        vars(metadata)["sequences_of"] = self.sequences_of

    @contextlib.contextmanager
    def step(self, tables: dict[str, Table]) -> Iterator[None]:
        """Look at a step.

        Args:
            tables: Of the requests that have tokens in it, as the scheduler has them.
        """
        self._tables, self._step = tables, Step(self._num_steps)
        self._num_steps += 1
        try:
            yield
        finally:
            if sorted(self._step.requests) != sorted(tables):
                self._step.faults.append(
                    f"{self._step.requests} are in the batch, not {[*tables]}"
                )
            self._file.write(json.dumps(asdict(self._step)) + "\n")
            self._file.flush()
            self._step = None

    def sequences_of(
        self,
        query_start_loc: list[int],
        seq_lens: list[int],
        block_table: torch.Tensor,
        *rest: Any,
    ) -> Iterator[metadata.Sequence]:
        """Yield a step's sequences, and compare their tables with the scheduler's."""
        sequences = [*self._sequences_of(query_start_loc, seq_lens, block_table, *rest)]
        # a dummy batch is in no step
        if self._step is not None:
            batch = self._request_ids()
            rows = {
                query_start_loc[row]: (batch[row], block_table[row].tolist())
                for row in range(len(seq_lens))
                if query_start_loc[row + 1] > query_start_loc[row]
            }
            self._requests = {first: request for first, (request, _) in rows.items()}
            for sequence in sequences:
                request, row = rows[sequence.first_token]
                self._step.requests.append(request)
                self._check_table(request, row, sequence.live_blocks.tolist())
        return iter(sequences)

    def _check_table(self, request: str, row: Blocks, live: Blocks) -> None:
        assert self._step is not None
        self._step.tables = zlib.crc32(repr(live).encode(), self._step.tables)
        table = self._tables.get(request)
        if table is None:
            # told at the end of the step
            return
        own = [
            None if block is None else row[place]
            for place, block in enumerate(table.blocks)
        ]
        if own != table.blocks:
            self._fault(request, f"has the row {own}, not {table.blocks}")
        if strangers := {*live} - {*table.blocks}:
            self._fault(request, f"reads {sorted(strangers)}, which are not its own")
        if len(live) > table.most_blocks:
            self._fault(
                request,
                f"reads {len(live)} blocks, at most {table.most_blocks} are its",
            )

    def evict(
        self,
        sequence: metadata.Sequence,
        kv_caches: Sequence[torch.Tensor],
        block_size: int,
        *,
        measured: bool,
        **how: Any,
    ) -> int:
        """Evict, and note what is kept."""
        assert self._step is not None
        request, row = self._requests[sequence.first_token], sequence.row
        eviction = Eviction(
            request,
            sequence.num_tokens,
            (sequence.evicted_before, sequence.evicted_after),
            alike=row.score in (SCORE_NONE, SCORE_RANDOM),
        )
        self._step.evictions.append(eviction)
        num_evicted = sequence.evicted_after - sequence.evicted_before
        num_full = sequence.num_tokens // block_size - sequence.evicted_before
        full = sequence.live_blocks[:num_full]
        before = positions(kv_caches, full) if measured else []
        moved = self._evict(sequence, kv_caches, block_size, measured=measured, **how)
        if not measured:
            return moved
        resident = row.resident_blocks
        live = torch.cat((full[:resident], full[resident + num_evicted :]))
        of_layers = positions(kv_caches, live)
        eviction.kept = of_layers[0]
        if any(kept != eviction.kept for kept in of_layers):
            self._fault(request, f"has layers that keep {of_layers}")
        of_heads = queries(kv_caches, live)
        eviction.queries = of_heads[0]
        if any(seen != eviction.queries for seen in of_heads):
            self._fault(request, f"has heads that were asked {of_heads} times")
        self._check_kept(eviction, before[0], row.sink, row.recent, block_size)
        return moved

    def _check_kept(
        self, eviction: Eviction, before: list[int], sink: int, recent: int, size: int
    ) -> None:
        """Check what is kept with what there was."""
        given_up = {*before} - {*eviction.kept}
        first, last = eviction.evicted
        if len(given_up) != last - first or len(eviction.kept) + len(given_up) != len(
            before
        ):
            self._fault(eviction.request, f"kept {eviction.kept} of {before}")
        newest = eviction.num_tokens - recent
        if lost := [one for one in given_up if one < sink or one + size > newest]:
            self._fault(eviction.request, f"lost {lost}, which are protected")

    def _fault(self, request: str, what: str) -> None:
        assert self._step is not None
        self._step.faults.append(f"{request} {what}")


def positions(kv_caches: Sequence[torch.Tensor], blocks: torch.Tensor) -> list[Blocks]:
    """Return the positions of blocks' first tokens in each layer."""
    return [first_positions_view(cache)[blocks].int().tolist() for cache in kv_caches]


def queries(kv_caches: Sequence[torch.Tensor], blocks: torch.Tensor) -> list[list[int]]:
    """Return how many queries have seen blocks, by each head of each layer."""
    of_layers = [statistics_view(cache)[blocks, :, NUM_QUERIES] for cache in kv_caches]
    return torch.cat(of_layers, 1).int().T.tolist()
