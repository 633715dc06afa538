# SPDX-License-Identifier: Apache-2.0
"""What decode attention's programs are told to attend over."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tests.ops import test_decode as decode
from tests.ops.paged_case import Heads
from vllm_roco.kv_cache import page
from vllm_roco.ops.decode.plan import DecodePlan, DecodeScratch, plan_decode
from vllm_roco.ops.decode.splits import FINEST, ROWS, SPLIT_FIELDS, DecodeSplits
from vllm_roco.ops.device import H100

APART = decode.PLAN
IN_TURNS = replace(decode.PLAN, splits=1, shares=4)
PLANS = {"apart": APART, "in turns": IN_TURNS}
KV_HEADS = 2

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def dealt(lengths: list[int], plan: DecodePlan, device: torch.device) -> DecodeSplits:
    """Return the splits of rows, with what an earlier step left behind."""
    splits = DecodeSplits.allocate([(len(lengths), plan)], KV_HEADS, device)
    for memory in (splits.splits, splits.of_rows, splits.ranked):
        memory.fill_(77)
    splits.deal(torch.tensor(lengths, dtype=torch.int32, device=device), plan)
    return splits


def in_turns(lengths: list[int], plan: DecodePlan) -> list[int]:
    """Return the splits of rows of which a share is one of what is left."""
    left, counts = sum(lengths), []
    least = min(max(lengths) // FINEST, -(-left // plan.shares))
    least = max(least, plan.least_tokens)
    for tokens in lengths:
        share = max(-(-left // plan.shares), least)
        counts.append(max(1, (tokens + share // 2) // share))
        left -= tokens
    return counts


def at_once(lengths: list[int], plan: DecodePlan) -> list[int]:
    """Return the splits of rows that are about a share each."""
    total = max(1, sum(lengths))
    counts = [
        min(round_half_up(tokens * plan.shares, total), tokens // plan.least_tokens)
        for tokens in lengths
    ]
    return [max(1, count) for count in counts]


def round_half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def expected(lengths: list[int], plan: DecodePlan) -> list[list[int]]:
    """Return the splits that have something to do, in their order."""
    rows = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    ranked = [lengths[row] for row in rows]
    counts = (at_once if plan.merged_apart else in_turns)(ranked, plan)
    found, kept = [], 0
    for row, tokens, count in zip(rows, ranked, counts, strict=True):
        found += [[row, split, count, tokens, kept] for split in range(count)]
        kept += count if count > 1 or plan.merged_apart else 0
    return found


def draw_lengths(seed: int) -> list[int]:
    draw = random.Random(seed)
    most = draw.choice([1, 64, 700, 40_000])
    count = draw.choice([1, 2, 7, ROWS, ROWS + 3])
    lengths = [draw.choice([0, 1, draw.randint(0, most)]) for _ in range(count)]
    lengths[draw.randrange(count)] = most
    return lengths


@pytest.mark.parametrize("seed", range(12))
@every_plan
def test_every_row_is_split_as_it_should_be(
    plan: DecodePlan, seed: int, device: torch.device
) -> None:
    lengths = draw_lengths(seed)
    if seed % 3 == 0:
        plan = replace(plan, shares=5 * (seed // 3) + 1)
    splits = dealt(lengths, plan, device)
    wanted = expected(lengths, plan)
    assert splits.splits[: len(wanted), :5].tolist() == wanted
    # programs that are left over have nothing to do
    assert not splits.splits[len(wanted) :, 2].any()
    assert len(splits.splits) == plan.most_splits(len(lengths)) >= len(wanted)
    of_rows = {row: [kept, count] for row, _, count, _, kept in wanted}
    assert splits.of_rows.tolist() == [of_rows[row] for row in range(len(lengths))]
    # what is merged has a place of its own
    kept = [
        at + split for _, split, count, _, at in wanted if count > 1 or plan.splits > 1
    ]
    assert kept == [*range(len(kept))]
    assert len(kept) <= plan.kept_splits(len(lengths))


def test_rows_of_one_length_are_split_as_planned(device: torch.device) -> None:
    for count in (2, 3, 4, 16):
        plan = replace(APART, shares=5 * count)
        found = dealt([16 * 64] * 5, plan, device).splits[:, 2].tolist()
        assert found == [count] * 5 * count + [0] * 5


def planned(num_rows: int) -> DecodePlan:
    return plan_decode(
        num_rows=num_rows,
        num_kv_heads=4,
        head_size=128,
        max_live_tokens=4096,
        dtype=torch.bfloat16,
        device=H100,
    )


def test_rows_that_take_turns_are_split_towards_the_end(device: torch.device) -> None:
    """Each split costs a merge, which early ones would pay for nothing."""
    plan = planned(256)
    assert not plan.merged_apart
    lengths = [2048 + row for row in range(256)]
    found = dealt(lengths, plan, device).splits
    rows, counts = found[:, 0].tolist(), found[:, 2].tolist()
    # the longest first
    assert rows[:180] == [*range(255, 75, -1)]
    assert counts[:180] == [1] * 180
    splits = [counts[rows.index(row)] for row in range(66)]
    assert splits == sorted(splits, reverse=True)
    # of an eighth of a row at last
    assert splits[0] == round(2048 / (2303 // FINEST)) == 7
    assert splits[-1] > 1
    # one that takes longer than all others together is split from the start
    found = dealt([*lengths[1:], 600_000], plan, device).splits
    assert found[0, 0] == 255
    assert found[0, 2] > 20


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0, 3.0, 9.0])
@pytest.mark.parametrize("longest", [500, 1024, 2303, 8192, 32768, 100_000])
@pytest.mark.parametrize("rows", [66, 70, 128, 300, 1000])
def test_rows_that_take_turns_have_programs_enough(
    rows: int, longest: int, power: float
) -> None:
    """A split without a program would be left out of its row."""
    plan = planned(rows)
    lengths = [int(longest * (1 - row / rows) ** power) for row in range(rows)]
    assert sum(in_turns(lengths, plan)) <= plan.most_splits(rows)


@pytest.mark.parametrize("seed", range(8))
def test_no_rows_take_more_programs_in_turns(seed: int) -> None:
    """Each takes half of a split for nothing, as far as rounding allows."""
    draw = random.Random(seed)
    for _ in range(200):
        shares, least = draw.choice([1, 2, 5, 12, 49, 99]), draw.choice([32, 256, 512])
        plan = replace(IN_TURNS, shares=shares, least_tokens=least)
        left, lengths = draw.choice([10_000, 10**6, 10**7]), []
        for _ in range(draw.randint(1, 60)):
            # just enough of what is left for one split more
            part = (draw.randint(1, 8) + 0.5) / shares
            lengths.append(min(int(left * part) + 1, left))
            left -= lengths[-1]
        lengths.sort(reverse=True)
        assert sum(in_turns(lengths, plan)) <= plan.most_splits(len(lengths))


def test_lengths_whose_sum_is_long_are_shared_as_any(device: torch.device) -> None:
    """Their sum times the shares is more than 32 bits hold."""
    lengths = [400_000_000] * 3
    assert dealt(lengths, APART, device).of_rows[:, 1].tolist() == [4, 4, 4]
    lengths = [700_000_000] * 5
    found = dealt(lengths, IN_TURNS, device).of_rows[:, 1].tolist()
    assert found == in_turns(lengths, IN_TURNS)


def test_a_split_is_worth_its_end() -> None:
    """From two tiles on, and beside whole rows four."""
    assert planned(256).least_tokens == 4 * planned(256).tile
    assert planned(8).least_tokens == 2 * planned(8).tile


def test_rows_that_all_run_at_once_are_split_by_length(device: torch.device) -> None:
    plan = planned(48)
    assert plan.merged_apart
    assert plan.shares * 4 == 2 * H100.num_multiprocessors
    assert dealt([4000] * 48, plan, device).of_rows[:, 1].tolist() == [1] * 48
    # a long one beside short ones has what they leave
    found = dealt([4000] + [400] * 47, plan, device).of_rows[:, 1].tolist()
    assert found == [12] + [1] * 47


def test_rows_that_are_nearly_enough_stay_whole_with_larger_tiles() -> None:
    """Fewer rows are split in two, each half with tiles as everywhere else."""
    layouts = [(planned(rows).tile, planned(rows).shares) for rows in (36, 44, 45, 65)]
    assert layouts == [(64, 66), (64, 66), (128, 66), (128, 66)]


def test_a_split_is_at_least_a_tile() -> None:
    """One without a tile would have nothing to tell."""
    with pytest.raises(ValueError, match="a split of 31 tokens is less than a tile"):
        replace(APART, least_tokens=31)


@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("measure", [True, False], ids=["", "no statistics"])
@pytest.mark.parametrize(
    "lengths",
    [[300, 1, 33, 0, 64], [40, 700, 33, 31], [129], [0, 0, 97], [90, 90, 90]],
    ids=str,
)
@every_plan
def test_ragged_rows(
    plan: DecodePlan,
    lengths: list[int],
    measure: bool,
    has_sinks: bool,
    device: torch.device,
) -> None:
    case = decode.build(lengths, Heads(6, 2, 32), device)
    if has_sinks:
        case.add_sinks()
    assert any(count > 1 for _, _, count, *_ in expected(lengths, plan))
    if measure:
        decode.check(case, plan)
    else:
        found = decode.run(case, plan, measure=False)
        torch.testing.assert_close(found, case.expected().output)


def test_programs_of_a_row_leave_their_arrivals_as_they_found_them(
    device: torch.device,
) -> None:
    """The next layer counts again, over what lies in the same places."""
    lengths = [500, 33, 0, 130]
    splits = dealt(lengths, IN_TURNS, device)
    assert splits.of_rows[:, 1].tolist() == [3, 1, 1, 2]
    scratch: DecodeScratch | None = None
    for _ in range(3):
        case = decode.build(lengths, Heads(4, KV_HEADS, 32), device)
        exact = case.expected()
        scratch = decode.scratch_for(case, IN_TURNS) if scratch is None else scratch
        decode.run(case, IN_TURNS, splits=splits, scratch=scratch)
        case.check_tails(exact)
        assert not splits.arrivals.any()


def test_whoever_comes_last_merges(device: torch.device) -> None:
    """And not the row's last split: an earlier one may take longer.

    Each kv head and row counts for itself: here the second head of the second row.
    """
    if device.type != "cpu":
        pytest.skip("only Triton's interpreter runs programs in their order")
    plan = replace(IN_TURNS, shares=4)
    case = decode.build([64, 64], Heads(4, 2, 32), device)
    exact = case.expected()
    splits = DecodeSplits.allocate([(2, plan)], 2, device)
    splits.deal(case.live_lens, plan)
    assert splits.of_rows.tolist() == [[0, 2], [2, 2]]
    scratch = decode.scratch_for(case, plan)
    # as if its second split had come, with all of the weight, and the first were late
    values = torch.randn(2, 32)
    scratch.partial_output.view(-1, 4, 32)[3, 2:] = values
    scratch.partial_lse.view(-1, 4)[3, 2:] = 200.0
    splits.arrivals[2, 1] = 1
    blocks = case.live_table[1, :4].long()
    before = case.statistics[blocks, 1, page.MASS_SUM]
    # the programs that come after it find nothing to do
    late = splits.splits[3].clone()
    splits.splits[3, 2] = 0
    output = decode.run(case, plan, splits=splits, scratch=scratch)
    torch.testing.assert_close(output[1, 2:], values)
    assert torch.equal(case.statistics[blocks[:2], 1, page.MASS_SUM], before[:2])
    # the other head of its row still waits, and the other row has its own
    assert splits.arrivals[2].tolist() == [1, 0]
    assert int(splits.arrivals.sum()) == 1
    torch.testing.assert_close(output[0], exact.output[0])
    # its second split brings it to an end
    splits.splits[:2, 2] = 0
    splits.splits[2, 2], splits.splits[3] = 0, late
    output = decode.run(case, plan, splits=splits, scratch=scratch)
    torch.testing.assert_close(output[1, :2], exact.output[1, :2])


def test_every_launch_has_room_for_its_splits() -> None:
    """One allocation serves all numbers of rows, whatever their plans are."""
    plans = [
        (
            rows,
            plan_decode(
                num_rows=rows,
                num_kv_heads=8,
                head_size=128,
                max_live_tokens=2304,
                dtype=torch.bfloat16,
                device=H100,
            ),
        )
        for rows in range(1, 300)
    ]
    splits = DecodeSplits.allocate(plans, 8, torch.device("cpu"))
    for rows, plan in plans:
        assert splits.splits.shape[0] >= plan.most_splits(rows)
        assert splits.splits.shape[1] == SPLIT_FIELDS
        assert len(splits.of_rows) >= rows
        assert splits.arrivals.shape == (len(splits.arrivals), 8)
        assert plan.merged_apart or len(splits.arrivals) >= plan.kept_splits(rows)
