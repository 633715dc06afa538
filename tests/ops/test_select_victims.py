# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from tests.ops.paged_case import paged_on
from tests.rows import row_of
from vllm_roco import policy, reference
from vllm_roco.config import RocoConfig, blocks_of
from vllm_roco.eviction_row import EvictionRow
from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.kv_cache import page
from vllm_roco.ops import contribution
from vllm_roco.ops.move_blocks import first_pages
from vllm_roco.ops.score_blocks import SCORES, first_statistics
from vllm_roco.ops.select_oldest import select_oldest
from vllm_roco.ops.select_victims import select_victims

BLOCK_SIZE = 16
Moves = list[list[tuple[int, int]]]


@dataclasses.dataclass
class Group:
    """A group's layers and the rows that end a step over them.

    Attributes:
        caches: One a layer.
        live_table: `[num_rows, width]` int32.
        steps: Computed tokens of each row, before and after.
        schedule: Of all rows.
        head_size: Numbers of a key, and of a value.
    """

    caches: list[torch.Tensor]
    live_table: torch.Tensor
    steps: list[tuple[int, int]]
    schedule: EvictionSchedule
    head_size: int = 16

    @classmethod
    def build(
        cls,
        steps: list[tuple[int, int]],
        schedule: EvictionSchedule,
        device: torch.device,
        *,
        layers: int = 3,
        kv_heads: int = 2,
        distinct: int | None = None,
        dtype: torch.dtype = torch.float16,
        head_size: int = 16,
        seed: int | None = None,
    ) -> Group:
        """Draw statistics at random, of `distinct` different values if given.

        Some blocks were seen by queries of other sequences too. First positions are
        those of blocks moved about: distinct, in no order.
        """
        generator = torch.Generator().manual_seed(len(steps) if seed is None else seed)
        size = schedule.block_size
        num_full = [after // size for _, after in steps]
        width = max(schedule.budget_blocks, *(n + 1 for n in num_full))
        caches = [
            reference.paged_cache(
                num_blocks=len(steps) * width,
                num_kv_heads=kv_heads,
                block_size=size,
                head_size=head_size,
                dtype=dtype,
                device=device,
            )
            for _ in range(layers)
        ]
        table = torch.randperm(len(steps) * width, generator=generator)
        table = table.view(-1, width)
        for row, (before, after) in enumerate(steps):
            live = after // size - schedule.evicted_blocks(before)
            logical = torch.randperm(after // size, generator=generator)[:live]
            for cache in caches:
                drawn = torch.rand(live, kv_heads, page.NUM_FIELDS, generator=generator)
                if distinct:
                    drawn = (drawn * distinct).ceil()
                first = logical * size
                others = torch.where(logical < 8, 100 * logical, 0)
                drawn[..., page.NUM_QUERIES] = (after - first + others)[:, None]
                blocks = table[row, :live]
                values = torch.randn(
                    live, kv_heads, size, head_size, generator=generator
                )
                if distinct:
                    # of three kinds, so that distances tie (of two, all would)
                    values = values[torch.arange(live) % 3]
                content = cache.view(E4M3) if dtype == torch.uint8 else cache
                content[blocks.to(device), ..., head_size:] = values.to(content)
                page.statistics_view(cache)[blocks] = drawn.to(device)
                page.first_positions_view(cache)[blocks] = first.to(device).float()
        return cls(caches, table.to(device, torch.int32), steps, schedule, head_size)

    @property
    def block_size(self) -> int:
        return self.schedule.block_size

    def to(self, device: torch.device) -> Group:
        """Return the group on another device; itself where it lies there already."""
        if self.live_table.device == device:
            return self
        caches = [paged_on(device, cache) for cache in self.caches]
        table = self.live_table.to(device)
        return dataclasses.replace(self, caches=caches, live_table=table)

    def evicted(self, which: int) -> torch.Tensor:
        return self.int32(
            [self.schedule.evicted_blocks(step[which]) for step in self.steps]
        )

    @property
    def most_blocks(self) -> int:
        """The most full live blocks of a row."""
        return max(
            after // self.block_size - self.schedule.evicted_blocks(before)
            for before, after in self.steps
        )

    def int32(self, values: list[int] | list[EvictionRow]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.live_table.device)

    def expected(
        self,
        how: EvictionRow,
        dtype: torch.dtype = torch.float32,
        change: Callable[[torch.Tensor], torch.Tensor] = lambda numbers: numbers,
    ) -> Moves:
        """Return each row's moves, as block ids, by the policy in PyTorch.

        Args:
            how: How all rows evict.
            dtype: In which it is worked out.
            change: Of statistics and of values' distances, before they are compared.
        """
        result: Moves = []
        for row, (before, after) in enumerate(self.steps):
            evicted, victims = (
                self.schedule.evicted_blocks(before),
                self.schedule.evicted_blocks(after),
            )
            places: list[tuple[int, int]] = []
            if victims > evicted:
                full = self.live_table[row, : after // self.block_size - evicted].long()
                statistics = [
                    page.statistics_view(cache)[full] for cache in self.caches
                ]
                values = [
                    (cache.view(E4M3) if cache.dtype == torch.uint8 else cache)[full]
                    .transpose(0, 1)
                    .to(dtype)
                    .chunk(2, -1)[1]
                    for cache in self.caches
                ]
                places = policy.plan_moves(
                    policy.select_victims(
                        change(torch.stack(statistics).transpose(1, 2).to(dtype)),
                        page.first_positions_view(self.caches[0])[full],
                        after,
                        victims - evicted,
                        self.block_size,
                        how,
                        change(policy.value_distances(torch.stack(values))),
                    ),
                    self.schedule.budget_blocks,
                )
            result.append(self.blocks(row, places))
        return result

    def blocks(self, row: int, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        ids = self.live_table[row].tolist()
        return [(ids[source], ids[target]) for source, target in places]

    def run(
        self,
        how: EvictionRow | list[EvictionRow],
        *,
        measures: bool = True,
        slices: int = 2,
    ) -> Moves:
        """Return each row's moves by the kernels, after checking their count."""
        moves, num_moves, moved = self.launch(how, measures=measures, slices=slices)
        counts = num_moves.tolist()
        assert moved.item() == 100 + sum(counts)
        for row, count in enumerate(counts):
            assert (moves[row, count:] == -1).all()
        return [
            [(s, t) for s, t in moves[row, :count].tolist()]
            for row, count in enumerate(counts)
        ]

    def launch(
        self,
        how: EvictionRow | list[EvictionRow],
        *,
        measures: bool = True,
        slices: int = 2,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Launch the kernels; return moves and their numbers, 100 more in sum."""
        hows = how if isinstance(how, list) else [how] * len(self.steps)
        views = [page.statistics_view(cache) for cache in self.caches]
        device = self.live_table.device
        max_moves = self.schedule.budget_blocks
        moves = torch.full(
            (len(self.steps), max_moves, 2), -1, dtype=torch.int32, device=device
        )
        num_moves = self.int32([-1] * len(self.steps))
        moved = torch.full((1,), 100, dtype=torch.int64, device=device)
        outputs = {
            "live_table": self.live_table,
            "evicted_before": self.evicted(0),
            "evicted_after": self.evicted(1),
            "moves": moves,
            "num_moves": num_moves,
            "moved": moved,
            "rows": self.int32(hows),
            "block_size": self.block_size,
        }
        if measures:
            select_victims(
                first_page_of_layer=first_pages(self.caches),
                first_statistics_of_layer=first_statistics(views),
                page_bytes=views[0].stride(0) * views[0].element_size(),
                num_kv_heads=views[0].shape[1],
                head_size=self.head_size,
                dtype=self.caches[0].dtype,
                seq_lens=self.int32([after for _, after in self.steps]),
                scores=torch.empty(
                    len(self.steps),
                    slices,
                    SCORES,
                    self.most_blocks,
                    device=device,
                ),
                **outputs,  # type: ignore[arg-type]
            )
        else:
            select_oldest(**outputs)  # type: ignore[arg-type]
        return moves, num_moves, moved


def options(schedule: EvictionSchedule, **changes: object) -> EvictionRow:
    sizes = {"budget": schedule.budget, "stride": schedule.stride}
    config = RocoConfig(**{"recent": 16, **sizes, **changes})  # type: ignore[arg-type]
    return row_of(config, schedule.block_size)


E4M3 = torch.float8_e4m3fn
SMALL = EvictionSchedule(block_size=BLOCK_SIZE, budget=12 * 16, stride=4 * 16)


def steps_of(schedule: EvictionSchedule) -> list[tuple[int, int]]:
    """Return decode and prompt steps, evicting or not, and a padded row."""
    edge = schedule.budget + schedule.stride
    chunk = 2 * schedule.stride + 5
    return [
        (0, 0),
        (edge - 1, edge),
        (edge - 2, edge - 1),
        (edge, edge + 1),
        (edge - 3, edge + chunk),
        (edge + schedule.stride - 1, edge + schedule.stride),
        (edge + 7 * schedule.stride - 40, edge + 7 * schedule.stride + 3),
        (0, edge + schedule.stride),
    ]


@pytest.mark.parametrize("shield", ["contribution", "peak", "deviation"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_moves_are_those_of_the_policy(
    shield: str, ratio: float, device: torch.device
) -> None:
    group = Group.build(steps_of(SMALL), SMALL, device)
    how = options(SMALL, shield=shield, shield_ratio=ratio)
    expected = group.expected(how)
    assert any(expected)
    assert group.run(how) == expected


@pytest.mark.parametrize("distinct", [1, 2])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shield", ["contribution", "peak"])
def test_ties_go_against_the_older_block(
    distinct: int, ratio: float, shield: str, device: torch.device
) -> None:
    """With equal ages no count differs, so masses of few values tie exactly."""
    group = Group.build(steps_of(SMALL), SMALL, device, distinct=distinct)
    how = options(SMALL, shield=shield, shield_ratio=ratio)
    assert group.run(how) == group.expected(how)


def test_heads_without_any_mass(device: torch.device) -> None:
    group = Group.build(steps_of(SMALL), SMALL, device)
    for cache in group.caches:
        page.statistics_view(cache)[..., : page.NUM_QUERIES] = 0
    how = options(SMALL)
    assert group.run(how) == group.expected(how)


def test_protected_blocks_fill_the_budget(device: torch.device) -> None:
    """Only the victims themselves are left to choose from."""
    group = Group.build([(255, 256)], SMALL, device)
    how = options(SMALL, sink=80, recent=112)
    assert group.run(how) == group.expected(how)


@pytest.mark.parametrize("slices", [1, 3, 5])
def test_slices_of_the_layers(slices: int, device: torch.device) -> None:
    group = Group.build(steps_of(SMALL), SMALL, device, layers=4)
    how = options(SMALL)
    assert group.run(how, slices=slices) == group.expected(how)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_values_of_any_cache(dtype: torch.dtype, device: torch.device) -> None:
    """Bytes are float8 times a scale, which is the same for all blocks of a head."""
    group = Group.build(steps_of(SMALL), SMALL, device, dtype=dtype)
    how = options(SMALL)
    assert group.run(how) == group.expected(how)


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("no_number", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8]
)
def test_a_head_whose_values_are_no_numbers_says_nothing(
    dtype: torch.dtype, no_number: float, slices: int, device: torch.device
) -> None:
    """The kernel took 0 for every head of its slice, the policy NaN for all heads.

    Of an fp8 cache it took 480.
    """
    if dtype == torch.uint8 and math.isinf(no_number):
        pytest.skip("float8 e4m3 has no infinity")
    group = Group.build(steps_of(SMALL), SMALL, device, layers=4, dtype=dtype)
    how = options(SMALL)
    expected = group.expected(how)
    negative = math.copysign(1, no_number) < 0
    stored = 0x7F | negative << 7 if dtype == torch.uint8 else no_number
    for cache in group.caches[1:3]:
        # one number of one head's values, in each row
        cache[group.live_table[:, 2].long(), 1, 5, -1] = stored
    found = group.run(how, slices=slices)
    assert found == group.expected(how)
    # the other heads tell more than the blocks' age
    assert found != group.expected(options(SMALL, shield_ratio=0.0))
    assert found != expected


@pytest.mark.parametrize("programs", [1, 3])
def test_rows_that_share_a_program(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than programs, which look at a few rows at once."""
    group = Group.build(steps_of(SMALL), SMALL, device)
    monkeypatch.setattr(contribution, "_MOST_PROGRAMS", programs * 3 * 2)
    monkeypatch.setattr(contribution, "_ROWS", 4)
    how = options(SMALL)
    assert how.shields_by_contribution
    assert group.run(how) == group.expected(how)


@pytest.mark.parametrize("runs", [1, 4, 8, 16])
def test_neighbours_in_a_long_text(runs: int, device: torch.device) -> None:
    """Blocks that are as far apart as a row has some want the same place for a note."""
    edge = SMALL.budget + 500 * SMALL.stride
    group = Group.build([(edge - 1, edge)] * 3, SMALL, device)
    live = group.most_blocks
    assert live == 16
    numbers = torch.arange(live).view(runs, -1) % (live // runs)
    numbers += live * torch.arange(1, runs + 1)[:, None]
    for row in range(3):
        order = torch.randperm(live, generator=torch.Generator().manual_seed(row))
        blocks = group.live_table[row, :live].long()
        for cache in group.caches:
            first = numbers.flatten()[order] * BLOCK_SIZE
            page.first_positions_view(cache)[blocks] = first.to(device).float()
    # one of many counts for its neighbours, if it has any
    how = options(SMALL)
    for cache in group.caches:
        peaks = page.statistics_view(cache)[..., page.MASS_PEAK]
        peaks *= torch.logspace(-3, 0, peaks.shape[0], device=device)[:, None]
    expected = group.expected(how)
    assert group.run(how) == expected
    assert any(expected)


def test_large_budget(device: torch.device) -> None:
    schedule = EvictionSchedule(block_size=BLOCK_SIZE, budget=1024 * 16, stride=256)
    edge = schedule.budget + schedule.stride
    group = Group.build([(edge - 1, edge)], schedule, device, layers=1, kv_heads=1)
    how = options(schedule)
    assert group.run(how) == group.expected(how)


@pytest.mark.parametrize("sink", [0, 16, 40, 192])
def test_recent_moves_are_those_of_the_policy(sink: int, device: torch.device) -> None:
    group = Group.build(steps_of(SMALL), SMALL, device)
    how = options(SMALL, policy="recent", sink=sink, recent=0)
    expected = [
        group.blocks(
            row,
            policy.plan_recent_moves(
                SMALL.evicted_blocks(before),
                SMALL.evicted_blocks(after),
                SMALL.budget_blocks,
                blocks_of(sink, BLOCK_SIZE),
            )
            if SMALL.evicted_blocks(after) > SMALL.evicted_blocks(before)
            else [],
        )
        for row, (before, after) in enumerate(group.steps)
    ]
    assert group.run(how, measures=False) == expected


@pytest.mark.parametrize("policy", ["h2o", "random", "recent"])
def test_scores_are_those_of_the_policy(policy: str, device: torch.device) -> None:
    group = Group.build(steps_of(SMALL), SMALL, device)
    how = options(SMALL, policy=policy)._replace(seed=12345)
    expected = group.expected(how)
    assert any(expected)
    assert group.run(how) == expected
    assert expected != group.expected(options(SMALL))


def test_every_row_goes_by_its_own(device: torch.device) -> None:
    """Each of the rows that evict differs from the others in all that it goes by."""
    step = (SMALL.budget + SMALL.stride - 1, SMALL.budget + SMALL.stride)
    policies = [
        options(SMALL),
        options(SMALL, shield="deviation", shield_ratio=0.3),
        options(SMALL, policy="h2o", sink=40),
        options(SMALL, policy="random", recent=0),
        options(SMALL, policy="recent", sink=0),
        options(SMALL, sink=64, recent=64),
    ]
    group = Group.build([step] * len(policies), SMALL, device)
    expected = [group.expected(how)[row] for row, how in enumerate(policies)]
    assert group.run(policies) == expected
