# SPDX-License-Identifier: Apache-2.0
"""Which blocks go: scores from the statistics, candidates, and the two stages."""

import dataclasses
import math
from collections.abc import Sequence

import torch

from tests.oracle.options import Options


@dataclasses.dataclass(frozen=True)
class Block:
    """One full live block at the moment of a choice.

    Attributes:
        index: Logical index: position // block_size of its tokens.
        queries_seen: Queries that saw it so far (C); the larger, the older.
        mean: Largest share, over layers and kv heads, of the blocks' means (M).
        deviation: The same of their standard deviations (D).
        peak: The same of their peaks (P).
        contribution: The same of peak times distance of values, see `score_blocks`.
        total: The same of their sums (S1).
        lender: Index of the block whose contribution counts for it; None before that is
            known.
    """

    index: int
    queries_seen: int
    mean: float
    deviation: float
    peak: float
    total: float = 0.0
    contribution: float = 0.0
    lender: int | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """The blocks that go, and how near it was.

    Attributes:
        victims: Logical indices, sorted.
        margin: Smallest relative gap between the two values on either side of a
            stage's boundary: 0 is a tie, infinity a stage that had no choice. Two
            correct computations may differ where it is near rounding error.
    """

    victims: tuple[int, ...]
    margin: float


def score_blocks(
    indices: Sequence[int],
    queries_seen: torch.Tensor,
    mass_sum: torch.Tensor,
    mass_square_sum: torch.Tensor,
    mass_peak: torch.Tensor,
    distance: torch.Tensor | None = None,
) -> list[Block]:
    """Turns the statistics of a sequence's full live blocks into scores.

    Args:
        indices: Logical indices of the blocks.
        queries_seen: int64 [blocks].
        mass_sum: float32 [layers * kv heads, blocks] (S1).
        mass_square_sum: float32 [layers * kv heads, blocks] (S2).
        mass_peak: float32 [layers * kv heads, blocks].
        distance: float32 [layers * kv heads, blocks], of each block's mean value from
            that of all; None for 0.
    """
    if distance is None:
        distance = torch.zeros_like(mass_peak)
    mean = mass_sum / queries_seen
    variance = mass_square_sum / queries_seen - mean.square()
    scores = zip(
        _largest_share(mean),
        _largest_share(variance.clamp_min(0).sqrt()),
        _largest_share(mass_peak),
        _largest_share(mass_sum),
        _largest_share(mass_peak * distance),
        strict=True,
    )
    return [
        Block(index, seen, *block_scores)
        for index, seen, block_scores in zip(
            indices, queries_seen.tolist(), scores, strict=True
        )
    ]


def _largest_share(values: torch.Tensor) -> list[float]:
    """Returns per block the largest of its shares of each row's sum.

    A row that sums to zero gives every block the share 0.
    """
    totals = values.sum(dim=1, keepdim=True)
    shares = torch.where(totals > 0, values / totals, 0.0)
    return shares.amax(dim=0).tolist()


def find_candidates(
    blocks: Sequence[Block], num_computed_tokens: int, options: Options
) -> list[Block]:
    """Leaves out the incoming, the sink and the recent blocks.

    Args:
        blocks: The full live blocks.
        num_computed_tokens: After the step (n1).
        options: The run's options.
    """
    first_arriving = options.budget_blocks + options.evicted_blocks(num_computed_tokens)
    first_recent_position = num_computed_tokens - options.recent

    def may_go(block: Block) -> bool:
        first_position = block.index * options.block_size
        end_position = first_position + options.block_size
        return (
            block.index < first_arriving
            and first_position >= options.sink
            and end_position <= first_recent_position
        )

    return [block for block in blocks if may_go(block)]


def choose_victims(
    candidates: Sequence[Block],
    num_victims: int,
    options: Options,
    live: Sequence[Block] = (),
) -> Choice:
    """Chooses the blocks that go.

    Args:
        candidates: The blocks that may go.
        num_victims: How many do.
        options: The run's options.
        live: Further full blocks, whose contributions shield those beside them.

    Equal values go to the older block in both stages: of blocks with equal shield
    values the older stays exposed, of exposed blocks with equal means the older goes.

    Raises:
        RuntimeError: There are fewer candidates than victims.
    """
    if len(candidates) < num_victims:
        raise RuntimeError(
            f"{num_victims} blocks must go, but only {len(candidates)} may"
        )
    if options.policy == "recent":
        oldest = sorted(block.index for block in candidates)[:num_victims]
        return Choice(tuple(oldest), math.inf)
    if options.policy == "random":
        by_number = sorted(
            (block_number(block.index * options.block_size, options.seed), block.index)
            for block in candidates
        )
        return Choice(
            tuple(sorted(index for _, index in by_number[:num_victims])), math.inf
        )
    if options.policy == "h2o":
        victims, margin = _take_smallest(candidates, num_victims, "total")
        return Choice(tuple(sorted(block.index for block in victims)), margin)

    num_shielded = min(
        math.floor(options.shield_ratio * options.budget_blocks),
        len(candidates) - num_victims,
    )
    if options.shield == "contribution":
        candidates = _lend(candidates, live)
    exposed, shield_margin = _take_smallest(
        candidates, len(candidates) - num_shielded, options.shield
    )
    victims, mean_margin = _take_smallest(exposed, num_victims, "mean")
    indices = tuple(sorted(block.index for block in victims))
    return Choice(indices, min(shield_margin, mean_margin))


def _lend(candidates: Sequence[Block], live: Sequence[Block]) -> list[Block]:
    """Raises contributions to three quarters of those one block before and behind."""
    known = {block.index: block.contribution for block in (*live, *candidates)}
    raised = []
    for block in candidates:
        offers = [(block.contribution, block.index)] + [
            (0.75 * known[lender], lender)
            for lender in (block.index - 1, block.index + 1)
            if lender in known
        ]
        most, lender = max(offers)
        raised.append(dataclasses.replace(block, contribution=most, lender=lender))
    return raised


def block_number(first_position: int, seed: int) -> int:
    """Mixes a block's first position and a seed into 24 bits.

    Multiplications are those of 32-bit registers; a right shift loses the low bits.
    """
    register = 2**32
    number = (first_position * 0x9E3779B1) % register ^ seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        number = (number ^ number // 2**shift) * factor % register
    return number // 2**8


def _take_smallest(
    blocks: Sequence[Block], count: int, score: str
) -> tuple[list[Block], float]:
    """Returns the `count` blocks of smallest score, and the gap to the others.

    The gap is the smallest between one that is taken and one that is not, relative to
    the latter. Two contributions of the same block are equal however they are computed,
    and have none.
    """
    ordered = sorted(
        blocks, key=lambda block: (getattr(block, score), -block.queries_seen)
    )
    taken, left = ordered[:count], ordered[count:]
    gaps = [
        1 - getattr(one, score) / getattr(other, score)
        if getattr(other, score) > 0
        else 0.0
        for one in taken
        for other in left
        if score != "contribution" or one.lender is None or one.lender != other.lender
    ]
    return taken, min(gaps, default=math.inf)
