# SPDX-License-Identifier: Apache-2.0
"""Ragged batches over a cache of which only live tokens are numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from vllm_roco import fp8_cache, reference
from vllm_roco.kv_cache import page


@dataclass(frozen=True)
class Heads:
    q_heads: int
    kv_heads: int
    head_size: int

    def __str__(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}/{self.head_size}"


HEADS = [
    Heads(8, 2, 128),
    Heads(7, 1, 128),
    Heads(16, 2, 128),
    Heads(3, 1, 64),
    Heads(2, 2, 128),
    Heads(4, 2, 80),
    Heads(2, 1, 96),
    Heads(2, 1, 256),
    Heads(20, 1, 64),
]


@dataclass
class PagedCase:
    """Rows with queries, live tables and statistics, before a step.

    Attributes:
        query: `[num_queries, q_heads, head_size]`.
        query_start_loc: `[num_rows + 1]` int32.
        kv_cache: `[num_blocks, kv_heads, block_size, 2 * head_size]`; NaN wherever no
            live token lies.
        live_table: `[num_rows, live_width]` int32.
        live_lens: `[num_rows]` int32.
        evicted_before: `[num_rows]` int32.
        scale: Softmax scale.
        sinks: `[q_heads]`, or None.
        k_scale: Of keys, None unless the cache is fp8.
        v_scale: Of values, likewise.
    """

    query: torch.Tensor
    query_start_loc: torch.Tensor
    kv_cache: torch.Tensor
    live_table: torch.Tensor
    live_lens: torch.Tensor
    evicted_before: torch.Tensor
    scale: float
    sinks: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        rows: list[tuple[int, int]],
        heads: Heads,
        device: torch.device,
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        token_major: bool = False,
    ) -> PagedCase:
        """Build a case, with statistics where a block is older than the step.

        Args:
            rows: Query length and live length of each row.
            heads: The heads of the layer.
            device: Where the tensors go.
            block_size: Tokens per block.
            dtype: Element type of query and cache.
            token_major: Page layout.
        """
        generator = torch.Generator().manual_seed(len(rows) + block_size)
        longest = max(length for _, length in rows)
        width = -(-longest // block_size) + 1
        num_blocks = len(rows) * width
        cache = reference.paged_cache(
            num_blocks=num_blocks,
            num_kv_heads=heads.kv_heads,
            block_size=block_size,
            head_size=heads.head_size,
            dtype=dtype,
            device=device,
            token_major=token_major,
        )
        statistics = page.statistics_view(cache)
        first_positions = page.first_positions_view(cache)
        table = torch.randperm(num_blocks, generator=generator).view(-1, width)
        for row, (query_len, length) in enumerate(rows):
            for index in range(-(-length // block_size)):
                block = table[row, index]
                count = min(block_size, length - index * block_size)
                content = torch.randn(
                    heads.kv_heads, count, 2 * heads.head_size, generator=generator
                )
                cache[block, :, :count] = content.to(device, dtype)
                if index * block_size < length - query_len:
                    drawn = torch.rand(
                        heads.kv_heads, page.NUM_FIELDS, generator=generator
                    )
                    drawn[:, page.NUM_QUERIES] = 1000 + index
                    statistics[block] = drawn.to(device)
                    first_positions[block] = 10_000 + index
        starts = torch.tensor([0, *(query_len for query_len, _ in rows)]).cumsum(0)
        query = torch.randn(
            int(starts[-1]), heads.q_heads, heads.head_size, generator=generator
        )
        return cls(
            query=query.to(device, dtype),
            query_start_loc=starts.to(device, torch.int32),
            kv_cache=cache,
            live_table=table.to(device, torch.int32),
            live_lens=torch.tensor(
                [length for _, length in rows], dtype=torch.int32, device=device
            ),
            evicted_before=2 * torch.arange(len(rows), device=device).to(torch.int32),
            scale=heads.head_size**-0.5,
        )

    def add_sinks(self) -> None:
        """Give every head a sink: some take nearly all, some nearly nothing, one none.

        They follow each other without a pattern that a group could hide.
        """
        sinks = torch.tensor([4.0, -3.0, 9.0, 0.5, 6.0, 2.0, -torch.inf])
        num_heads = self.query.shape[1]
        repeated = sinks.repeat(-(-num_heads // len(sinks)))[:num_heads]
        self.sinks = repeated.to(self.query.device, self.query.dtype)

    def in_fp8(self, *, per_head: bool, dtype: torch.dtype | None = None) -> PagedCase:
        """Return the case with keys and values as bytes, with scales far from 1.

        Args:
            per_head: Whether each kv head has scales of its own.
            dtype: Element type of the query, if another.
        """
        num_blocks, num_kv_heads, block_size, content = self.kv_cache.shape
        device = self.kv_cache.device
        own = torch.arange(num_kv_heads if per_head else 1, device=device)
        k_scale, v_scale = 0.03 * (own + 1.0), 0.7 / (own + 1.0)
        cache = reference.paged_cache(
            num_blocks=num_blocks,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            head_size=content // 2,
            dtype=torch.uint8,
            device=device,
            token_major=self.kv_cache.stride(1) < self.kv_cache.stride(2),
        )
        keys, values = self.kv_cache.chunk(2, -1)
        cache[..., : content // 2] = fp8_cache.to_bytes(keys, k_scale.view(-1, 1, 1))
        cache[..., content // 2 :] = fp8_cache.to_bytes(values, v_scale.view(-1, 1, 1))
        page.statistics_view(cache).copy_(self.statistics)
        page.first_positions_view(cache).copy_(self.first_positions)
        query = self.query.to(dtype or self.query.dtype)
        return replace(
            self, query=query, kv_cache=cache, k_scale=k_scale, v_scale=v_scale
        )

    def to(self, device: torch.device) -> PagedCase:
        """Return the case on another device; itself where it lies there already."""
        if self.query.device == device:
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {
            name: value.to(device)
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved | {"kv_cache": paged_on(device, self.kv_cache)})

    @property
    def states(self) -> torch.Tensor:
        """Keys and values as numbers, whatever the cache holds."""
        if self.k_scale is None or self.v_scale is None:
            return self.kv_cache
        return fp8_cache.states_from_bytes(self.kv_cache, self.k_scale, self.v_scale)

    @property
    def block_size(self) -> int:
        return self.kv_cache.shape[2]

    @property
    def statistics(self) -> torch.Tensor:
        return page.statistics_view(self.kv_cache)

    @property
    def first_positions(self) -> torch.Tensor:
        return page.first_positions_view(self.kv_cache)

    @property
    def max_live_tokens(self) -> int:
        return self.live_table.shape[1] * self.block_size

    def expected(
        self, *, soft_cap: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> Expected:
        """Return what a step should leave.

        Args:
            soft_cap: Bound of the logits' soft cap, 0 for none.
            dtype: Element type to round to, see `reference.attend`; float64 to work all
                out in it.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        query = self.query.to(wide)
        output = torch.zeros_like(query)
        lse = output.new_zeros(query.shape[1], len(query))
        statistics = self.statistics.to(wide, copy=True)
        first_positions = self.first_positions.clone()
        starts, states = self.query_start_loc.tolist(), self.states
        for row, length in enumerate(self.live_lens.tolist()):
            queries = slice(starts[row], starts[row + 1])
            if length == 0:
                continue
            blocks = self.live_table[row, : -(-length // self.block_size)]
            attended = reference.attend(
                query=query[queries],
                kv_cache=states,
                blocks=blocks,
                live_len=length,
                scale=self.scale,
                soft_cap=soft_cap,
                sinks=self.sinks,
                dtype=dtype,
            )
            output[queries] = attended.output.to(wide)
            lse[:, queries] = attended.lse
            reference.update_statistics(
                statistics=statistics,
                first_positions=first_positions,
                blocks=blocks,
                mass=attended.mass,
                live_len=length,
                evicted=int(self.evicted_before[row]),
                block_size=self.block_size,
            )
        return Expected(output, lse, statistics, first_positions)

    def check_tails(self, exact: Expected, low: Expected | None = None) -> None:
        """Assert that every number of the pages' tails is as exact as float32 sums.

        Args:
            exact: What a step should leave.
            low: The same by the reference in float32, where `exact` is not.
        """
        low = low or exact
        for field in range(page.NUM_FIELDS):
            found, expected = self.statistics[..., field], exact.statistics[..., field]
            assert_as_good_as(found, expected, low.statistics[..., field])
        torch.testing.assert_close(
            self.first_positions, exact.first_positions, rtol=0, atol=0, equal_nan=True
        )


def paged_on(device: torch.device, cache: torch.Tensor) -> torch.Tensor:
    """Return a copy of whole pages on a device, as a cache of the same layout."""
    pages = page.page_view(cache).to(device, copy=True)
    return pages.as_strided(cache.shape, cache.stride())


@dataclass(frozen=True)
class Expected:
    """What a step should leave, in float32 or float64.

    Attributes:
        output: `[num_queries, q_heads, head_size]`.
        lse: `[q_heads, num_queries]`, natural logarithm.
        statistics: `[num_blocks, kv_heads, NUM_FIELDS]`, NaN where nothing is written.
        first_positions: `[num_blocks]`, likewise.
    """

    output: torch.Tensor
    lse: torch.Tensor
    statistics: torch.Tensor
    first_positions: torch.Tensor


def assert_as_good_as(
    got: torch.Tensor, exact: torch.Tensor, low: torch.Tensor, floor: float = 2e-6
) -> None:
    """Assert that `got` errs at most twice as much as `low` does.

    Args:
        got: What a kernel returned.
        exact: The float32 reference; NaN where nothing may be written.
        low: The reference rounded to the kernel's element type on its way.
        floor: Relative error of float32 sums in another order.
    """
    assert got.shape == exact.shape
    torch.testing.assert_close(got.isnan(), exact.isnan())
    error = (got.float() - exact).nan_to_num().abs().max()
    allowed = 2 * (low.float() - exact).nan_to_num().abs().max()
    allowed += floor * (1 + exact.nan_to_num().abs().max())
    assert error <= allowed, f"it errs by {error:.2e}, allowed is {allowed:.2e}"


def boundary_lengths(block_size: int) -> list[int]:
    """Return lengths around every boundary of a budget of 2, a stride of 1 block."""
    budget, stride = 2 * block_size, block_size
    edges = [1, block_size - 1, block_size, block_size + 1, budget]
    return [*edges, budget + stride - 1, budget + stride, budget + stride + 1]
