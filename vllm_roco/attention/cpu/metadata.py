# SPDX-License-Identifier: Apache-2.0
"""What one step means for RoCo's layers on a CPU: who attends over which blocks.

Built once per step and shared by the layers of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from typing_extensions import override
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder

from vllm_roco import policy
from vllm_roco.attention.layers import LayerGroup, roco_spec
from vllm_roco.attention.moved_blocks import moved_blocks_of
from vllm_roco.attention.request_rows import request_rows
from vllm_roco.attention.tensor_ranks import tensor_ranks
from vllm_roco.config import blocks_of
from vllm_roco.eviction_row import EvictionRow
from vllm_roco.validation import validated_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from collections.abc import Sequence as SequenceOf

    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_roco.observability.publisher import MovedBlocks

MAX_BATCH_TOKENS = 1 << 17
"""Keys of one kv head that a batch of decodes gathers at most, padding included."""


@dataclass(frozen=True)
class Sequence:
    """One row of the batch.

    Attributes:
        first_token: Index of its first query among the step's tokens.
        num_queries: Its queries in this step.
        num_tokens: Its length after the step.
        evicted_before: `E` at the start of the step, in blocks.
        evicted_after: `E` at its end.
        live_blocks: `[num_live_blocks]` int64, block ids of the live table.
        row: How it evicts.
    """

    first_token: int
    num_queries: int
    num_tokens: int
    evicted_before: int
    evicted_after: int
    live_blocks: torch.Tensor
    row: EvictionRow

    @property
    def is_measured(self) -> bool:
        """Whether the step adds to the statistics of its blocks."""
        return self.row.measures(self.num_tokens - self.num_queries)


@dataclass(frozen=True)
class Batch:
    """Sequences with the same number of queries, padded to the longest.

    Attributes:
        tokens: `[num_rows, num_queries]` int64, indices into the step's tokens.
        table: `[num_rows, num_blocks]` int64, live block ids, 0 where there is none.
        live_tokens: `[num_rows]` int64, tokens attended, the queries' own included.
        is_live: `[num_rows, num_blocks]` bool, whether `table` names a block.
        is_measured: Likewise, whether the block's statistics are added to.
        is_new: `[num_rows, num_blocks]` bool, blocks that get their first token now.
        first_positions: `[num_rows, num_blocks]` int64, of the new blocks.
    """

    tokens: torch.Tensor
    table: torch.Tensor
    live_tokens: torch.Tensor
    is_live: torch.Tensor
    is_measured: torch.Tensor
    is_new: torch.Tensor
    first_positions: torch.Tensor

    @classmethod
    def of(cls, rows: list[Sequence], block_size: int) -> Batch:
        """Pad the given sequences into one batch."""
        table = torch.nn.utils.rnn.pad_sequence(
            [row.live_blocks for row in rows], batch_first=True
        )
        place = torch.arange(table.shape[1])
        first = torch.tensor([row.first_token for row in rows])
        tokens = torch.tensor([row.num_tokens for row in rows])
        evicted = torch.tensor([row.evicted_before for row in rows])
        resident = torch.tensor([row.row.resident_blocks for row in rows])
        measured = torch.tensor([row.is_measured for row in rows])
        num_queries = rows[0].num_queries
        live = tokens - evicted * block_size
        is_live = place < ((live + block_size - 1) // block_size)[:, None]
        is_new = is_live & (place * block_size >= (live - num_queries)[:, None])
        # behind the resident blocks, the place in the row is that in the table plus E
        gap = evicted[:, None] * (place >= resident[:, None])
        return cls(
            tokens=first[:, None] + torch.arange(num_queries),
            table=table,
            live_tokens=live,
            is_live=is_live,
            is_measured=is_live & measured[:, None],
            is_new=is_new,
            first_positions=(place + gap) * block_size,
        )


@dataclass
class RocoCpuMetadata(AttentionMetadata):
    """One step of one KV cache group.

    Attributes:
        block_size: Tokens per block.
        layers: The layers of the group.
        moved_blocks: Where this worker counts the blocks it moves, or None.
        batches: The step's sequences.
        evicting: The sequences that give up blocks at the end of the step.
        any_rank: See `policy.select_victims`.
        num_layers_done: Layers that have attended in this step.
    """

    block_size: int
    layers: LayerGroup
    moved_blocks: MovedBlocks | None
    batches: list[Batch]
    evicting: list[Sequence]
    any_rank: Callable[[torch.Tensor], torch.Tensor] = policy.of_one_rank
    num_layers_done: int = field(default=0)


def sequences_of(
    query_start_loc: list[int],
    seq_lens: list[int],
    block_table: torch.Tensor,
    rows: SequenceOf[EvictionRow],
    block_size: int,
) -> Iterator[Sequence]:
    """Yield the rows that have queries, each with its live table.

    Args:
        query_start_loc: `num_reqs + 1` offsets of the rows' queries.
        seq_lens: Length of each row after the step.
        block_table: `[num_reqs, width]`, block ids by `position // block_size`.
        rows: How each row evicts.
        block_size: Tokens per block.
    """
    for index, (num_tokens, row) in enumerate(zip(seq_lens, rows, strict=True)):
        first_token = query_start_loc[index]
        num_queries = query_start_loc[index + 1] - first_token
        if num_queries <= 0:
            continue
        schedule, resident = row.schedule(block_size), row.resident_blocks
        before = schedule.evicted_blocks(num_tokens - num_queries)
        blocks = block_table[index, : blocks_of(num_tokens, block_size)].long()
        yield Sequence(
            first_token=first_token,
            num_queries=num_queries,
            num_tokens=num_tokens,
            evicted_before=before,
            evicted_after=schedule.evicted_blocks(num_tokens),
            live_blocks=torch.cat((blocks[:resident], blocks[resident + before :])),
            row=row,
        )


def batches_of(sequences: Iterable[Sequence], block_size: int) -> list[Batch]:
    """Group decodes into batches of similar length; prompts stay alone."""
    decodes = []
    batches = []
    for sequence in sequences:
        if sequence.num_queries == 1:
            decodes.append(sequence)
        else:
            batches.append(Batch.of([sequence], block_size))
    decodes.sort(key=lambda sequence: len(sequence.live_blocks), reverse=True)
    while decodes:
        longest = len(decodes[0].live_blocks) * block_size
        count = max(1, MAX_BATCH_TOKENS // longest)
        batches.append(Batch.of(decodes[:count], block_size))
        decodes = decodes[count:]
    return batches


class RocoCpuMetadataBuilder(AttentionMetadataBuilder[RocoCpuMetadata]):
    """Builds the step's metadata from vLLM's; arguments as in the base class."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._block_size = roco_spec(kv_cache_spec).block_size
        self._rows = request_rows(vllm_config, self._block_size)
        self._layers = LayerGroup(layer_names, vllm_config)
        self._moved_blocks = moved_blocks_of(vllm_config)
        ranks = tensor_ranks(vllm_config, validated_config(vllm_config))
        self._any_rank = policy.of_one_rank if ranks is None else ranks.most

    @override
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> RocoCpuMetadata:
        """Work out the live tables and who evicts, from the lengths alone."""
        common = common_attn_metadata
        rows = [self._rows.default] * common.num_reqs
        if (own := self._rows.of_step(common)) is not None:
            rows = [EvictionRow(*row) for row in own.tolist()]
        sequences = list(
            sequences_of(
                common.query_start_loc_cpu.tolist(),
                common.seq_lens.tolist(),
                common.block_table_tensor,
                rows,
                self._block_size,
            )
        )
        return RocoCpuMetadata(
            block_size=self._block_size,
            layers=self._layers,
            moved_blocks=self._moved_blocks,
            batches=batches_of(sequences, self._block_size),
            evicting=[s for s in sequences if s.evicted_after > s.evicted_before],
            any_rank=self._any_rank,
        )
