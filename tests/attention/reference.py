# SPDX-License-Identifier: Apache-2.0
"""Attention and eviction of one sequence, dense, naive and in float64.

Keeps every key and value for ever, and of each block the list of the masses that it
received, one by one: no sums, no pages, no places.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean

import torch

from tests.oracle.victims import block_number
from vllm_roco.config import RocoConfig
from vllm_roco.eviction_schedule import EvictionSchedule


class DenseSequence:
    """One sequence through all layers of a model.

    Attributes:
        length: Tokens computed.
        kept: Logical blocks that are not evicted, in part filled ones included.
        keys: By layer, `[length, num_kv_heads, head_size]` float64.
        values: Likewise.
        masses: By (layer, kv head, logical block), the mass from each query that saw
            the block, in order, of whatever sequence that shares it.
    """

    def __init__(
        self,
        num_layers: int,
        schedule: EvictionSchedule,
        config: RocoConfig,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.length = 0
        self.kept: set[int] = set()
        self.keys = [torch.empty(0)] * num_layers
        self.values = [torch.empty(0)] * num_layers
        self.masses: defaultdict[tuple[int, int, int], list[float]] = defaultdict(list)
        self._schedule = schedule
        self._config = config
        self._soft_cap = soft_cap
        self._sinks = sinks

    def begin_behind(self, other: DenseSequence, num_blocks: int) -> None:
        """Begin with another sequence's first blocks, which both then look at.

        Args:
            other: Its first blocks are full and none is evicted.
            num_blocks: How many are shared.
        """
        self.length = num_blocks * self._schedule.block_size
        self.kept = set(range(num_blocks))
        self.keys = [keys[: self.length] for keys in other.keys]
        self.values = [values[: self.length] for values in other.values]
        for place, masses in other.masses.items():
            if place[2] < num_blocks:
                # the same list: it grows with the queries of both
                self.masses[place] = masses

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Return one layer's output for the next tokens, and note what they look at.

        Args:
            layer: Number of the layer.
            query: `[num_queries, num_heads, head_size]` float64.
            key: `[num_queries, num_kv_heads, head_size]` float64.
            value: Likewise.
            scale: Of the scores.
        """
        size = self._schedule.block_size
        start = self.length
        if start:
            key = torch.cat((self.keys[layer], key))
            value = torch.cat((self.values[layer], value))
        self.keys[layer], self.values[layer] = key, value
        blocks = sorted(self.kept | set(range(start // size, -(-len(key) // size))))
        group = query.shape[1] // key.shape[1]
        output, every = torch.empty_like(query), torch.arange(len(key))
        for index in range(len(query)):
            position = start + index
            seen = [block for block in blocks if block * size <= position]
            ends = [min((block + 1) * size, position + 1) for block in seen]
            sizes = [end - block * size for block, end in zip(seen, ends, strict=True)]
            tokens = torch.cat(
                [every[end - n : end] for end, n in zip(ends, sizes, strict=True)]
            )
            for kv_head in range(key.shape[1]):
                heads = slice(kv_head * group, (kv_head + 1) * group)
                scores = query[index, heads] @ key[tokens, kv_head].T * scale
                if self._soft_cap:
                    scores = self._soft_cap * torch.tanh(scores / self._soft_cap)
                weights = scores.exp()
                total = weights.sum(-1, keepdim=True)
                if self._sinks is not None:
                    total += self._sinks[heads, None].double().exp()
                probabilities = weights / total
                output[index, heads] = probabilities @ value[tokens, kv_head]
                by_block = probabilities.mean(0).split(sizes)
                for block, shares in zip(seen, by_block, strict=True):
                    self.masses[layer, kv_head, block].append(shares.sum().item())
        return output

    def evict(self, num_queries: int) -> set[int]:
        """Count the step's tokens and return the logical blocks that it evicts."""
        size = self._schedule.block_size
        before = self._schedule.evicted_blocks(self.length)
        first_new = self.length // size
        self.length += num_queries
        after = self._schedule.evicted_blocks(self.length)
        self.kept.update(range(first_new, -(-self.length // size)))
        evicted = self._choose(after - before, self._schedule.budget_blocks + after)
        self.kept -= evicted
        return evicted

    def _choose(self, count: int, first_arriving: int) -> set[int]:
        if not count:
            return set()
        size = self._schedule.block_size
        newest = self.length - self._config.recent
        exposed = [
            block
            for block in self.kept
            if block < first_arriving
            and block * size >= self._config.sink
            and (block + 1) * size <= newest
        ]
        if self._config.policy == "recent":
            return set(sorted(exposed)[:count])
        if self._config.policy == "h2o":
            total = self._largest_share(sum)
            return set(sorted(exposed, key=lambda block: (total[block], block))[:count])
        if self._config.policy == "random":
            by_number = sorted(
                exposed, key=lambda block: block_number(block * size, seed=0)
            )
            return set(by_number[:count])
        shielded = min(
            int(self._config.shield_ratio * self._schedule.budget_blocks),
            len(exposed) - count,
        )
        shield = self._shield()
        # of equals the older is exposed first
        exposed.sort(key=lambda block: (shield[block], block))
        exposed = exposed[: len(exposed) - shielded]
        mean = self._largest_share(fmean)
        exposed.sort(key=lambda block: (mean[block], block))
        return set(exposed[:count])

    def _shield(self) -> dict[int, float]:
        if self._config.shield == "peak":
            return self._largest_share(max)
        if self._config.shield == "deviation":
            return self._largest_share(_deviation)
        share = self._largest_share(max, by_values=True)
        return {
            block: max(
                share[block],
                0.75 * share.get(block - 1, 0.0),
                0.75 * share.get(block + 1, 0.0),
            )
            for block in share
        }

    def _largest_share(  # type: ignore[no-untyped-def]
        self, moment, *, by_values: bool = False
    ) -> dict[int, float]:
        size = self._schedule.block_size
        full = [block for block in self.kept if (block + 1) * size <= self.length]
        shares = dict.fromkeys(full, 0.0)
        heads = {(layer, kv_head) for layer, kv_head, _ in self.masses}
        for layer, kv_head in heads:
            values = {
                block: moment(self.masses[layer, kv_head, block]) for block in full
            }
            if by_values:
                distances = self._value_distances(layer, kv_head, full)
                values = {block: values[block] * distances[block] for block in full}
            total = sum(values.values()) or 1.0
            for block in full:
                shares[block] = max(shares[block], values[block] / total)
        return shares

    def _value_distances(
        self, layer: int, kv_head: int, blocks: list[int]
    ) -> dict[int, float]:
        """Return how far the mean value of each block lies from that of all tokens."""
        size = self._schedule.block_size
        values = self.values[layer][:, kv_head]
        tokens = [block * size + token for block in blocks for token in range(size)]
        centre = values[tokens].mean(0)
        return {
            block: torch.dist(
                values[block * size : (block + 1) * size].mean(0), centre
            ).item()
            for block in blocks
        }


def _deviation(values: list[float]) -> float:
    mean = fmean(values)
    return fmean((value - mean) ** 2 for value in values) ** 0.5
