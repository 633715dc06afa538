# SPDX-License-Identifier: Apache-2.0
"""RoCo on blocks, in plain float32 PyTorch: what is measured, and who goes.

RoCo (Ren & Zhu, "On the Efficacy of Eviction Policy for Key-Value Constrained
Generative Language Model Inference", arXiv 2402.06262, section 4) evicts in two stages:
the entries with the largest deviation are shielded, and of the rest those with the
smallest mean go. Here the entries are blocks, one decision holds for all layers and
heads, and the shield may also be the peak, which unlike the deviation does not fade as
a block grows old, or the contribution, which is the peak times what the block's values
add. To drop a block that has the share `a` of a query's attention changes the output by
`a * |the block's own output - the output without it|` (CAOTE, arXiv 2504.14051). Here
the mean of the block's values stands for the one, and the mean of all live values for
the other. A fact does not stop where a block does, so a contribution counts for the
blocks beside it in the text as well.

What counts as small in the second stage is a request's choice (`EvictionRow.score`).
Another one is one more function, named in `_SCORES`.

This file is the specification. Every kernel is judged against it.

Statistics are `[..., NUM_FIELDS]` float32 as they lie in a page (see `kv_cache.page`).
Blocks are in live order: the resident ones first, then the outgoing, then the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from vllm_roco.eviction_row import (
    NEIGHBOUR_SHARE,
    SCORE_MEAN,
    SCORE_NONE,
    SCORE_RANDOM,
    SCORE_SUM,
    EvictionRow,
)
from vllm_roco.kv_cache.page import (
    MASS_PEAK,
    MASS_SQUARES,
    MASS_SUM,
    NUM_QUERIES,
)

_TINY = torch.finfo(torch.float32).tiny
_UINT32 = 0xFFFFFFFF


def block_mass(probabilities: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the attention mass that each query gives to each block.

    The query heads that share a kv head are averaged first and squared later (the
    paper, section 4.1).

    Args:
        probabilities: `[..., num_kv_heads, group, num_queries, num_tokens]` float32,
            the softmax over whole blocks of live tokens; zero where a query cannot see.

    Returns:
        `[..., num_kv_heads, num_queries, num_tokens / block_size]` float32.
    """
    per_block = probabilities.unflatten(-1, (-1, block_size)).sum(-1)
    mass: torch.Tensor = per_block.mean(-3)
    return mass


def queries_that_see(
    first_tokens: torch.Tensor, num_tokens: torch.Tensor | int, num_queries: int
) -> torch.Tensor:
    """Return how many of a step's queries see each block.

    A block is seen by the query that writes its first token and by every later one.

    Args:
        first_tokens: `[..., num_blocks]`, places of the blocks' first tokens among the
            live ones.
        num_tokens: `[..., 1]`, live tokens, the queries' own included.
        num_queries: Queries of the step, the newest tokens.

    Returns:
        `[..., num_blocks]`, of the arguments' integer type.
    """
    return (num_tokens - first_tokens).clamp(0, num_queries)


def accumulate(
    statistics: torch.Tensor, mass: torch.Tensor, num_queries: torch.Tensor
) -> None:
    """Add one step's attention mass to the statistics, in place.

    Those of a block whose first token is this step's are zero before. Of a model that
    has overflowed the mass is no number; it adds nothing, for others may share the
    block, and only the queries count.

    Args:
        statistics: `[..., num_blocks, num_kv_heads, NUM_FIELDS]` float32.
        mass: `[..., num_kv_heads, num_queries, num_blocks]` float32.
        num_queries: `[..., num_blocks]`, the queries that see each block.
    """
    by_block = mass.movedim(-1, -3)
    by_block = by_block.where(by_block.sum(-1, keepdim=True).isfinite(), 0)
    statistics[..., MASS_SUM] += by_block.sum(-1)
    statistics[..., MASS_SQUARES] += by_block.square().sum(-1)
    peak = statistics[..., MASS_PEAK]
    torch.maximum(peak, by_block.amax(-1), out=peak)
    statistics[..., NUM_QUERIES] += num_queries[..., None]


def mean_of(statistics: torch.Tensor) -> torch.Tensor:
    """Return the mean mass over the queries that saw the block, of any sequence.

    Args:
        statistics: `[..., NUM_FIELDS]` float32.
    """
    return statistics[..., MASS_SUM] / statistics[..., NUM_QUERIES]


def deviation_of(statistics: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of the mass, argument as in `mean_of`."""
    mean = mean_of(statistics)
    square = statistics[..., MASS_SQUARES] / statistics[..., NUM_QUERIES]
    variance = square - mean.square()
    return variance.clamp_min(0).sqrt()


def peak_of(statistics: torch.Tensor) -> torch.Tensor:
    """Return the largest mass that one query gave, argument as in `mean_of`."""
    return statistics[..., MASS_PEAK]


def contribution_of(statistics: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Return what each block has contributed to an output.

    Of a model that has overflowed, values may be no numbers. Then a head says nothing
    of any block, and the others decide.

    Args:
        statistics: `[..., num_blocks, NUM_FIELDS]` float32, of full live blocks.
        distances: `[..., num_blocks]` float32, see `value_distances`.

    Returns:
        `[..., num_blocks]` float32.
    """
    contribution = peak_of(statistics) * distances
    return contribution.where(contribution.sum(-1, keepdim=True).isfinite(), 0)


def value_distances(values: torch.Tensor) -> torch.Tensor:
    """Return how far each block's mean value lies from the mean of all of them.

    Args:
        values: `[..., num_blocks, block_size, head_size]` float32, of full live blocks.

    Returns:
        `[..., num_blocks]` float32, Euclidean.
    """
    means = values.mean(-2)
    distances: torch.Tensor = (means - means.mean(-2, keepdim=True)).norm(dim=-1)
    return distances


def any_head(values: torch.Tensor) -> torch.Tensor:
    """Return each block's largest share in any layer and head.

    Args:
        values: `[num_layers, num_kv_heads, num_blocks]` float32, not negative.

    Returns:
        `[num_blocks]` float32: a block is worth keeping if any head needs it.
    """
    share = values / values.sum(-1, keepdim=True).clamp_min(_TINY)
    return share.amax((0, 1))


def of_one_rank(values: torch.Tensor) -> torch.Tensor:
    """Return values as they are: no rank but this one has heads."""
    return values


def with_neighbours(
    values: torch.Tensor, first_positions: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return at least a share of what the live blocks before and behind have.

    Args:
        values: `[num_blocks]` float32, not negative.
        first_positions: `[num_blocks]` float32, where the blocks begin, in any order.
        block_size: Tokens per block.

    Returns:
        `[num_blocks]` float32: of each block its own value or, if that is more,
        `NEIGHBOUR_SHARE` of the larger one of the blocks that begin `block_size` tokens
        before and behind it.
    """
    apart = (first_positions[:, None] - first_positions).abs()
    lent = values.where(apart == block_size, 0).amax(-1)
    return torch.maximum(values, lent * NEIGHBOUR_SHARE)


def random_order(first_positions: torch.Tensor, seed: int) -> torch.Tensor:
    """Return numbers that depend on a block's position and a seed alone.

    They are as good as random, and a block keeps its own for ever, so the blocks with
    the largest are a uniform sample of all that there were. The mixing is MurmurHash3's
    (`fmix32`), in integers, so that every device has the same.

    Args:
        first_positions: Positions of blocks' first tokens.
        seed: Not negative, below `2**32`.

    Returns:
        Of the same shape, float32, whole numbers below `2**24`.
    """
    x = (first_positions.long() * 0x9E3779B1 & _UINT32) ^ seed
    x ^= x >> 16
    x = x * 0x85EBCA6B & _UINT32
    x ^= x >> 13
    x = x * 0xC2B2AE35 & _UINT32
    x ^= x >> 16
    return (x >> 8).float()


def _by_mean(
    statistics: torch.Tensor, first_positions: torch.Tensor, row: EvictionRow
) -> torch.Tensor:
    return any_head(mean_of(statistics))


def _by_sum(
    statistics: torch.Tensor, first_positions: torch.Tensor, row: EvictionRow
) -> torch.Tensor:
    # H2O's heavy hitters (arXiv 2306.14048), on blocks
    return any_head(statistics[..., MASS_SUM])


def _by_age(
    statistics: torch.Tensor, first_positions: torch.Tensor, row: EvictionRow
) -> torch.Tensor:
    # all are equal, and of equal ones the oldest go
    return torch.zeros_like(first_positions)


def _at_random(
    statistics: torch.Tensor, first_positions: torch.Tensor, row: EvictionRow
) -> torch.Tensor:
    return random_order(first_positions, row.seed)


_SCORES: Mapping[
    int, Callable[[torch.Tensor, torch.Tensor, EvictionRow], torch.Tensor]
] = {
    SCORE_MEAN: _by_mean,
    SCORE_SUM: _by_sum,
    SCORE_NONE: _by_age,
    SCORE_RANDOM: _at_random,
}
"""Scores of the second stage: of statistics, first positions and row, as they are
handed to `select_victims`, `[num_full_blocks]` float32. The smallest go."""


def select_victims(
    statistics: torch.Tensor,
    first_positions: torch.Tensor,
    num_computed_tokens: int,
    num_victims: int,
    block_size: int,
    row: EvictionRow,
    distances: torch.Tensor | None = None,
    any_rank: Callable[[torch.Tensor], torch.Tensor] = of_one_rank,
) -> torch.Tensor:
    """Choose the blocks that a sequence gives up.

    Args:
        statistics: `[num_layers, num_kv_heads, num_full_blocks, NUM_FIELDS]` float32 of
            the sequence's full live blocks, in live order.
        first_positions: `[num_full_blocks]` float32, where they begin.
        num_computed_tokens: Length of the sequence after the step.
        num_victims: `m`. The candidates are the first `resident_blocks + m` blocks.
        block_size: Tokens per block.
        row: How the sequence evicts.
        distances: `[num_layers, num_kv_heads, num_full_blocks]` float32, see
            `value_distances`; a row that shields by the contribution needs them.
        any_rank: Turns what heads of this rank say into what those of any rank do: of
            `[num_full_blocks]` numbers that each rank brings, the largest. All ranks
            call it equally often.

    Returns:
        `[num_victims]` int64, places in live order, ascending.
    """
    first = first_positions[: row.resident_blocks + num_victims]
    newest = num_computed_tokens - row.recent
    protected = (first < row.sink) | (first + block_size > newest)
    # oldest first, so that every stable sort below breaks ties against the older block
    exposed = first.masked_fill(protected, torch.inf).argsort(stable=True)
    exposed = exposed[: int((~protected).sum())]

    shielded = min(row.shield_blocks, len(exposed) - num_victims)
    if shielded:
        if row.shields_by_contribution:
            assert distances is not None
            contribution = any_rank(any_head(contribution_of(statistics, distances)))
            shield = with_neighbours(contribution, first_positions, block_size)
        elif row.shields_by_deviation:
            shield = any_rank(any_head(deviation_of(statistics)))
        else:
            shield = any_rank(any_head(peak_of(statistics)))
        exposed = _smallest(exposed, shield, len(exposed) - shielded)
        # back to oldest first
        exposed = exposed[first[exposed].argsort(stable=True)]
    score = any_rank(_SCORES[row.score](statistics, first_positions, row))
    return _smallest(exposed, score, num_victims).sort().values


def _smallest(blocks: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    return blocks[values[blocks].argsort(stable=True)[:count]]


def plan_moves(victims: torch.Tensor, budget_blocks: int) -> list[tuple[int, int]]:
    """Return which outgoing survivors go over which resident victims.

    Args:
        victims: `[num_victims]` int64, places in live order, ascending.
        budget_blocks: `B`, the resident blocks.

    Returns:
        Pairs of places in live order, (source, destination), both ascending.
    """
    places = victims.tolist()
    gone = set(places)
    outgoing = range(budget_blocks, budget_blocks + len(places))
    sources = [place for place in outgoing if place not in gone]
    destinations = [place for place in places if place < budget_blocks]
    return list(zip(sources, destinations, strict=True))


def plan_recent_moves(
    evicted_before: int, evicted_after: int, budget_blocks: int, sink_blocks: int
) -> list[tuple[int, int]]:
    """Return the moves on a server of `policy="recent"`, which has no statistics.

    The resident blocks behind the sinks are a ring: the block of logical index `j` is
    at `sink + (j - sink) mod (B - sink)`, so the newest blocks replace the oldest.

    Args:
        evicted_before: `E` at the start of the step, in blocks.
        evicted_after: `E` at its end.
        budget_blocks: `B`, the resident blocks.
        sink_blocks: Blocks at the start of the sequence that stay, fewer than `B` or
            all of it.

    Returns:
        Pairs of places in live order, (source, destination).
    """
    ring = budget_blocks - sink_blocks
    if ring == 0:
        return []
    first_survivor = max(budget_blocks + evicted_before, evicted_after + sink_blocks)
    return [
        (logical - evicted_before, sink_blocks + (logical - sink_blocks) % ring)
        for logical in range(first_survivor, budget_blocks + evicted_after)
    ]
