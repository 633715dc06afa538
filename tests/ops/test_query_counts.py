# SPDX-License-Identifier: Apache-2.0
"""Statistics over several steps: each block counts the queries that saw it.

Every mass that a step gives to a block is written down beside the kernels, so that at
the end a page's sums can be told from their definition.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from vllm_roco import policy, reference
from vllm_roco.kv_cache import page
from vllm_roco.ops.decode.attention import decode_attention
from vllm_roco.ops.decode.plan import DecodePlan, DecodeScratch, DecodeScratchSize
from vllm_roco.ops.decode.splits import DecodeSplits
from vllm_roco.ops.device import H100
from vllm_roco.ops.move_blocks import first_pages, move_blocks
from vllm_roco.ops.prefill_mass import measure_prefill
from vllm_roco.ops.prefill_plan import PrefillScratch, plan_prefill

BLOCK_SIZE, KV_HEADS, GROUP, HEAD_SIZE = 16, 2, 2, 32
SCALE = HEAD_SIZE**-0.5

splits = pytest.mark.parametrize("splits", [1, 3])


class Pages:
    """A layer's pages, of which all tokens are numbers and all tails NaN.

    Attributes:
        masses: By block, `[queries, kv_heads]` of each step.
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self.device = device
        self.cache = reference.paged_cache(
            num_blocks=num_blocks,
            num_kv_heads=KV_HEADS,
            block_size=BLOCK_SIZE,
            head_size=HEAD_SIZE,
            dtype=torch.float32,
            device=device,
        )
        self._generator = torch.Generator().manual_seed(0)
        self.cache.copy_(self._drawn(*self.cache.shape))
        self.masses: dict[int, list[torch.Tensor]] = defaultdict(list)

    @property
    def statistics(self) -> torch.Tensor:
        return page.statistics_view(self.cache)

    @property
    def first_positions(self) -> torch.Tensor:
        return page.first_positions_view(self.cache)

    def step(
        self,
        blocks: list[int],
        query_len: int,
        length: int,
        *,
        evicted: int = 0,
        splits: int = 0,
    ) -> None:
        """Let a sequence's newest tokens attend over its blocks.

        Args:
            blocks: Its live table.
            query_len: The step's tokens.
            length: Live tokens, the step's own included.
            evicted: `E` at the start of the step.
            splits: Of the decode kernel, for one query; 0 for the prompts' kernel.
        """
        query = self._drawn(query_len, GROUP * KV_HEADS, HEAD_SIZE)
        live_table = self._int32([blocks])
        attended = reference.attend(
            query=query,
            kv_cache=self.cache,
            blocks=live_table[0],
            live_len=length,
            scale=SCALE,
        )
        for index, block in enumerate(blocks):
            seen = max(0, query_len - (length - index * BLOCK_SIZE))
            self.masses[block].append(attended.mass[seen:, :, index])
        tables = dict(
            live_table=live_table,
            live_lens=self._int32([length]),
            evicted_before=self._int32([evicted]),
        )
        if splits:
            self._decode(query, tables, splits)
        else:
            measure_prefill(
                query=query,
                kv_cache=self.cache,
                lse=attended.lse,
                query_start_loc=self._int32([0, query_len]),
                statistics=self.statistics,
                max_live_tokens=length,
                plan=plan_prefill(
                    head_size=HEAD_SIZE,
                    block_size=BLOCK_SIZE,
                    dtype=query.dtype,
                    device=H100,
                ),
                scratch=PrefillScratch.allocate(self.device),
                scale=SCALE,
                **tables,
            )

    def _decode(
        self, query: torch.Tensor, tables: dict[str, torch.Tensor], splits: int
    ) -> None:
        plan = DecodePlan(
            tile=16,
            splits=splits,
            num_warps=4,
            num_stages=2,
            dependent_launch=False,
            shares=3,
            least_tokens=16,
        )
        dealt = DecodeSplits.allocate([(1, plan)], KV_HEADS, self.device)
        dealt.deal(tables["live_lens"], plan)
        size = DecodeScratchSize.of(
            plans=[(1, plan)],
            num_q_heads=GROUP * KV_HEADS,
            head_size=HEAD_SIZE,
            block_size=BLOCK_SIZE,
            max_live_tokens=tables["live_table"].shape[1] * BLOCK_SIZE,
            measure=True,
        )
        decode_attention(
            query=query,
            kv_cache=self.cache,
            statistics=self.statistics,
            output=torch.empty_like(query),
            scratch=DecodeScratch.allocate(size, self.device),
            plan=plan,
            splits=dealt,
            scale=SCALE,
            measured_lens=tables["live_lens"],
            **tables,
        )

    def check_moments(self) -> None:
        """Assert that every page's moments are those of the masses it was given."""
        for block, steps in self.masses.items():
            # [queries, kv_heads]
            masses = torch.cat(steps)
            statistics = self.statistics[block]
            assert statistics[:, page.NUM_QUERIES].tolist() == [len(masses)] * KV_HEADS
            torch.testing.assert_close(policy.mean_of(statistics), masses.mean(0))
            torch.testing.assert_close(
                policy.deviation_of(statistics),
                masses.std(0, correction=0),
                rtol=1e-3,
                atol=1e-4,
            )
            assert torch.allclose(statistics[:, page.MASS_PEAK], masses.amax(0))

    def _drawn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)

    def _int32(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@splits
def test_a_sequence_of_its_own_counts_from_a_blocks_first_token(
    splits: int, device: torch.device
) -> None:
    """Chunks that begin and end within blocks, then decodes into a new block."""
    pages = Pages(6, device)
    blocks = [4, 1, 5, 2]
    length = 0
    for query_len in (21, 11, 14, 1, 1, 1, 1):
        length += query_len
        live = blocks[: -(-length // BLOCK_SIZE)]
        pages.step(live, query_len, length, splits=splits if query_len == 1 else 0)
        count = pages.statistics[live, :, page.NUM_QUERIES]
        expected = (length - pages.first_positions[live])[:, None]
        assert torch.equal(count, expected.expand_as(count))
    assert pages.first_positions[blocks].tolist() == [0, 16, 32, 48]
    pages.check_moments()
    # nobody else's page was touched
    assert pages.statistics[[0, 3]].isnan().all()
    assert pages.first_positions[[0, 3]].isnan().all()


@splits
def test_a_shared_block_counts_the_queries_of_every_sequence(
    splits: int, device: torch.device
) -> None:
    """Two sequences behind one header, by turns, and a third that copied it.

    The length of none of them tells how many queries the sums are of.
    """
    pages = Pages(9, device)
    header = [3, 0]
    first, second, third = [*header, 7], [*header, 5, 8], [6, 1, 2]
    pages.step(header, 32, 32)
    pages.step(first, 8, 40)
    pages.step(second, 17, 49)
    for source, target in zip(header, third, strict=False):
        page.page_view(pages.cache)[target] = page.page_view(pages.cache)[source]
        pages.masses[target] = list(pages.masses[source])
    for turn in range(3):
        pages.step(first, 1, 41 + turn, splits=splits)
        pages.step(second, 1, 50 + turn, splits=splits)
    pages.step(third, 5, 37)
    pages.step(third, 1, 38, splits=splits)
    pages.check_moments()
    count = pages.statistics[[*header, *third], 0, page.NUM_QUERIES]
    assert count.tolist() == [63, 47, 63, 47, 6]
    assert pages.first_positions[[*first, *third]].tolist() == [0, 16, 32] * 2
    assert pages.first_positions[second].tolist() == [0, 16, 32, 48]


@splits
def test_a_moved_block_keeps_its_first_position_and_its_count(
    splits: int, device: torch.device
) -> None:
    """Budget 2, stride 1: the outgoing block 2 goes over the resident block 1."""
    pages = Pages(6, device)
    row = [4, 1, 5, 2]
    pages.step(row[:3], 48, 48)
    move_blocks(
        first_page_of_layer=first_pages([pages.cache]),
        moves=torch.tensor([[[5, 1]]], dtype=torch.int32, device=device),
        num_moves=torch.tensor([1], dtype=torch.int32, device=device),
        page_bytes=pages.cache.stride(0) * pages.cache.element_size(),
    )
    pages.masses[1] = list(pages.masses[5])
    live = [4, 1, 2]
    length = 32
    for query_len in (3, 1, 1):
        length += query_len
        decode = splits if query_len == 1 else 0
        pages.step(live, query_len, length, evicted=1, splits=decode)
    assert pages.first_positions[live].tolist() == [0, 32, 48]
    count = pages.statistics[live, 1, page.NUM_QUERIES]
    assert count.tolist() == [53, 21, 5]
    pages.check_moments()
