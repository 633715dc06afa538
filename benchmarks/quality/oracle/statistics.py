# SPDX-License-Identifier: Apache-2.0
"""What is remembered of the attention that every entry received."""

from __future__ import annotations

import torch

from benchmarks.quality.oracle.rule import Rule
from benchmarks.quality.oracle.step import Step

_COUNT, _SUM, _SQUARES, _LAST, _PEAKS = range(5)


class Statistics:
    """Float32 statistics of all entries of a batch, in every layer and kv head.

    Attributes:
        fields: `[layers, fields, n, kv heads, entries]`; zero where no entry lives.
    """

    def __init__(
        self, rule: Rule, shape: tuple[int, int, int, int], device: torch.device
    ) -> None:
        """Start without entries.

        Args:
            rule: What is measured.
            shape: Layers, sequences, kv heads, entries.
            device: Where the statistics live.
        """
        layers, *rest = shape
        self._rule = rule
        self.fields = torch.zeros(
            layers, _PEAKS + rule.peak_queries, *rest, device=device
        )

    def begin_step(self, step: Step, budget: int) -> None:
        """Work out which queries of a step are measured, and by what weight."""
        rule = self._rule
        # queries of the same sequence that follow within the step
        later = torch.arange(step.width - 1, -1, -1, device=step.real.device)
        scored = step.real & (later % rule.query_every == 0)
        if rule.query_last:
            scored &= later < rule.query_last
        if rule.start == "full":
            scored &= (step.start + step.count > budget)[:, None]
        self._weights = scored * rule.forget**later
        self._peak_weights = scored * rule.fade**later
        if rule.forget < 1:
            factor = rule.forget**step.count
            self.fields[:, _COUNT : _SQUARES + 1] *= factor[:, None, None]
        if rule.fade < 1:
            self.fields[:, _PEAKS:] *= (rule.fade**step.count)[:, None, None]
        first_slot_visible = step.visible[..., :: rule.unit].float()
        seen = torch.einsum("nq,nqe->ne", self._weights, first_slot_visible)
        self.fields[:, _COUNT, ..., : seen.shape[-1]] += seen[:, None]

    def add(self, layer: int, probabilities: torch.Tensor) -> None:
        """Add what one layer's entries received in the step begun last.

        Args:
            layer: Its number.
            probabilities: `[n, kv heads, group, q, columns]` float32.
        """
        # the query heads of a kv head are averaged first and squared later
        received = probabilities.mean(2)
        if self._rule.unit > 1:
            tokens = received.unflatten(-1, (-1, self._rule.unit))
            received = tokens.sum(-1) if self._rule.inside == "sum" else tokens.amax(-1)
        fields = self.fields[layer, ..., : received.shape[-1]]
        fields[_SUM] += torch.einsum("nq,nhqe->nhe", self._weights, received)
        fields[_SQUARES] += torch.einsum(
            "nq,nhqe->nhe", self._weights, received.square()
        )
        fields[_LAST] = received[:, :, -1]
        peaks = received * self._peak_weights[:, None, :, None]
        if self._rule.peak_queries == 1:
            torch.maximum(fields[_PEAKS], peaks.amax(2), out=fields[_PEAKS])
        else:
            both = torch.cat((fields[_PEAKS:].permute(1, 2, 0, 3), peaks), 2)
            largest = both.topk(self._rule.peak_queries, dim=2).values
            fields[_PEAKS:] = largest.permute(2, 0, 1, 3)

    def value(self, name: str) -> torch.Tensor:
        """Return one statistic, `[layers, n, kv heads, entries]`.

        Args:
            name: One of `rule.MEASURED`. Beside the usual: `rms` is the root of the
                mean square; `focus`, squares over sum, is the attention received
                weighted by itself, which like the peak does not fade with age.
        """
        if name == "sum":
            return self.fields[:, _SUM]
        if name == "last":
            return self.fields[:, _LAST]
        if name == "peak":
            return self.fields[:, _PEAKS:].mean(1)
        squares = self.fields[:, _SQUARES]
        if name == "focus":
            return squares / self.fields[:, _SUM].clamp_min(_TINY)
        count = self.fields[:, _COUNT].clamp_min(_TINY)
        if name == "rms":
            return (squares / count).sqrt()
        mean = self.fields[:, _SUM] / count
        if name == "mean":
            return mean
        assert name == "deviation"
        return (squares / count - mean.square()).clamp_min(0).sqrt()

    def keep(self, entries: torch.Tensor, alive: torch.Tensor) -> None:
        """Drop entries.

        Args:
            entries: `[layers or 1, n, kv heads or 1, entries kept]` int64, the entries
                that stay, in order.
            alive: `[n, 1, entries kept]` bool, false where a sequence keeps fewer.
        """
        index = entries[:, None].expand(*self.fields.shape[:-1], -1)
        kept = self.fields.gather(-1, index) * alive
        self.fields.zero_()
        self.fields[..., : kept.shape[-1]] = kept


_TINY = 1e-30
