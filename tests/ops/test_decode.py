# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest
import torch

from vllm_roco.kv_cache import page
from vllm_roco.ops import reference
from vllm_roco.ops.decode import (
    DecodePlan,
    DecodeScratch,
    decode_attention,
    plan_decode,
)


@dataclasses.dataclass(frozen=True)
class Shape:
    q_heads: int
    kv_heads: int
    head_size: int

    def __str__(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}/{self.head_size}"


SHAPES = [
    Shape(8, 2, 128),
    Shape(7, 1, 128),
    Shape(16, 2, 128),
    Shape(3, 1, 64),
    Shape(2, 2, 128),
    Shape(4, 2, 80),
    Shape(2, 1, 96),
    Shape(2, 1, 256),
    Shape(20, 1, 64),
]
PLAN = DecodePlan(tile=32, splits=3, num_warps=4, num_stages=2, dependent_launch=False)


@dataclasses.dataclass
class Case:
    """A ragged decode batch over a cache of which only live tokens are numbers."""

    query: torch.Tensor
    kv_cache: torch.Tensor
    statistics: torch.Tensor
    live_table: torch.Tensor
    live_lens: torch.Tensor
    evicted_before: torch.Tensor
    scale: float

    @classmethod
    def build(
        cls,
        lengths: list[int],
        shape: Shape,
        device: torch.device,
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        token_major: bool = False,
    ) -> Case:
        generator = torch.Generator().manual_seed(len(lengths) + block_size)
        width = -(-max(lengths) // block_size) + 1
        num_blocks = len(lengths) * width
        cache = reference.paged_cache(
            num_blocks=num_blocks,
            num_kv_heads=shape.kv_heads,
            block_size=block_size,
            head_size=shape.head_size,
            dtype=dtype,
            device=torch.device("cpu"),
            token_major=token_major,
        )
        statistics = page.statistics_view(cache)
        table = torch.randperm(num_blocks, generator=generator).view(-1, width)
        for row, length in enumerate(lengths):
            for index in range(-(-length // block_size)):
                block = table[row, index]
                count = min(block_size, length - index * block_size)
                cache[block, :, :count] = torch.randn(
                    shape.kv_heads, count, 2 * shape.head_size, generator=generator
                ).to(dtype)
                # a block that starts in this step has no statistics yet
                if index * block_size < length - 1:
                    statistics[block] = torch.rand(
                        shape.kv_heads, page.NUM_FIELDS, generator=generator
                    )
        query = torch.randn(
            len(lengths), shape.q_heads, shape.head_size, generator=generator
        )
        storage = cache.as_strided(
            (cache.untyped_storage().nbytes() // dtype.itemsize,), (1,)
        )
        on_device = storage.to(device).as_strided(cache.shape, cache.stride())
        return cls(
            query=query.to(device, dtype),
            kv_cache=on_device,
            statistics=page.statistics_view(on_device),
            live_table=table.to(device, torch.int32),
            live_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            evicted_before=torch.arange(
                0, 2 * len(lengths), 2, dtype=torch.int32, device=device
            ),
            scale=shape.head_size**-0.5,
        )

    def run(
        self, plan: DecodePlan, *, measure: bool = True, soft_cap: float = 0.0
    ) -> torch.Tensor:
        """Run the kernels, which update `statistics`; return the output."""
        rows, q_heads, head_size = self.query.shape
        block_size = self.kv_cache.shape[2]
        output = torch.empty_like(self.query)
        decode_attention(
            query=self.query,
            kv_cache=self.kv_cache,
            live_table=self.live_table,
            live_lens=self.live_lens,
            evicted_before=self.evicted_before,
            statistics=self.statistics if measure else None,
            output=output,
            scratch=DecodeScratch.allocate(
                plans=[(rows, plan)],
                num_q_heads=q_heads,
                head_size=head_size,
                block_size=block_size,
                max_live_tokens=self.live_table.shape[1] * block_size,
                measure=measure,
                device=self.query.device,
            ),
            plan=plan,
            scale=self.scale,
            soft_cap=soft_cap,
        )
        return output

    def expected(
        self, *, soft_cap: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what output and statistics should be after the step."""
        block_size = self.kv_cache.shape[2]
        output = torch.zeros_like(self.query, dtype=torch.float32)
        statistics = self.statistics.clone()
        for row, length in enumerate(self.live_lens.tolist()):
            if length == 0:
                continue
            blocks = self.live_table[row, : -(-length // block_size)]
            attended = reference.attend(
                query=self.query[row : row + 1],
                kv_cache=self.kv_cache,
                blocks=blocks,
                live_len=length,
                scale=self.scale,
                soft_cap=soft_cap,
                dtype=dtype,
            )
            output[row] = attended.output[0].float()
            reference.update_statistics(
                statistics=statistics,
                blocks=blocks,
                mass=attended.mass,
                live_len=length,
                evicted=int(self.evicted_before[row]),
                block_size=block_size,
            )
        return output, statistics


def assert_as_good_as(
    got: torch.Tensor, exact: torch.Tensor, low: torch.Tensor, floor: float = 2e-6
) -> None:
    """Assert that `got` errs at most twice as much as `low` does.

    Args:
        got: What a kernel returned.
        exact: The float32 reference; NaN where nothing may be written.
        low: The reference computed in the kernel's element type.
        floor: Relative error of float32 sums in another order.
    """
    assert got.shape == exact.shape
    torch.testing.assert_close(got.isnan(), exact.isnan())
    error = (got.float() - exact).nan_to_num().abs().max()
    allowed = 2 * (low.float() - exact).nan_to_num().abs().max()
    assert error <= allowed + floor * (1 + exact.nan_to_num().abs().max())


def check(case: Case, plan: DecodePlan, *, soft_cap: float = 0.0) -> None:
    exact_output, exact_statistics = case.expected(soft_cap=soft_cap)
    low_output, low_statistics = case.expected(
        soft_cap=soft_cap, dtype=case.query.dtype
    )
    output = case.run(plan, soft_cap=soft_cap)
    assert output.isfinite().all()
    assert_as_good_as(output, exact_output, low_output)
    for field in range(page.NUM_FIELDS):
        assert_as_good_as(
            case.statistics[..., field],
            exact_statistics[..., field],
            low_statistics[..., field],
        )


def boundary_lengths(block_size: int) -> list[int]:
    budget, stride = 4 * block_size, 2 * block_size
    edges = [1, block_size - 1, block_size, block_size + 1, budget]
    edges += [budget + stride - 1, budget + stride, budget + stride + 1]
    return [0, *edges, 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_shapes(shape: Shape, device: torch.device) -> None:
    check(Case.build([1, 70, 33, 0], shape, device), PLAN)


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_lengths_around_every_boundary(
    block_size: int, splits: int, device: torch.device
) -> None:
    plan = dataclasses.replace(PLAN, splits=splits)
    lengths = boundary_lengths(block_size)
    case = Case.build(lengths, Shape(3, 1, 16), device, block_size=block_size)
    check(case, plan)


@pytest.mark.parametrize("tile", [16, 64, 128])
def test_tiles(tile: int, device: torch.device) -> None:
    """A block may span tiles, and a tile blocks."""
    plan = dataclasses.replace(PLAN, tile=tile)
    check(Case.build([150, 64, 1], Shape(4, 2, 32), device, block_size=32), plan)


@pytest.mark.parametrize("token_major", [True, False], ids=["LBNHC", "LBHNC"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_layouts_and_dtypes(
    token_major: bool, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers")
    case = Case.build(
        [90, 17, 1, 0], Shape(6, 3, 64), device, dtype=dtype, token_major=token_major
    )
    check(case, PLAN)


def test_soft_cap(device: torch.device) -> None:
    case = Case.build([90, 17], Shape(4, 2, 32), device)
    case.scale *= 20
    check(case, PLAN, soft_cap=5.0)


def test_soft_cap_far_beyond_its_bound(device: torch.device) -> None:
    case = Case.build([40], Shape(2, 1, 32), device)
    case.scale *= 1e4
    check(case, PLAN, soft_cap=0.5)


def test_without_statistics(device: torch.device) -> None:
    case = Case.build([90, 17, 0], Shape(4, 2, 32), device)
    exact, _ = case.expected()
    before = case.statistics.clone()
    output = case.run(PLAN, measure=False)
    torch.testing.assert_close(output, exact)
    torch.testing.assert_close(case.statistics, before, equal_nan=True, rtol=0, atol=0)


def test_masses_of_a_step_add_up_to_one(device: torch.device) -> None:
    case = Case.build([130], Shape(8, 2, 32), device)
    blocks = case.live_table[0, :9].long()
    case.statistics[blocks] = 0
    case.run(PLAN)
    total = case.statistics[blocks, :, page.MASS_SUM].sum(0)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize("head_size", [64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_plan_is_one_the_kernels_take(
    rows: int, head_size: int, dtype: torch.dtype
) -> None:
    plan = plan_decode(
        num_rows=rows,
        num_kv_heads=8,
        head_size=head_size,
        max_live_tokens=2304,
        dtype=dtype,
        num_multiprocessors=132,
        capability=(9, 0),
    )
    assert plan.tile in (16, 32, 64, 128)
    assert 1 <= plan.splits <= 128
    assert plan.dependent_launch
