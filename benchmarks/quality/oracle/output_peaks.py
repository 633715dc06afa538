# SPDX-License-Identifier: Apache-2.0
"""The most that an entry was worth to the output of one query, worked out exactly."""

from __future__ import annotations

import torch

from benchmarks.quality.oracle.step import Step

# numbers of one intermediate tensor
_MOST_NUMBERS = 2**29


class OutputPeaks:
    """Largest norms over queries, in every layer and kv head.

    Of the query heads of a kv head the mean counts. The `output` is what the entry's
    tokens add. The `error` is what the output would change by without them, which is
    CAOTE's (arXiv 2504.14051) on entries: with `a` the entry's mass, `v` its own output
    divided by that, and `o` the query's output, it is `a / (1 - a) * |o - v|`.

    Attributes:
        peaks: `[layers, n, kv heads, entries]` float32; zero where no entry lives.
    """

    def __init__(
        self, name: str, unit: int, shape: tuple[int, ...], device: torch.device
    ) -> None:
        """Start without entries.

        Args:
            name: `output` or `error`.
            unit: Tokens of an entry.
            shape: Layers, sequences, kv heads, entries.
            device: Where the peaks live.
        """
        self._is_error = name == "error"
        self._unit = unit
        self.peaks = torch.zeros(shape, device=device)

    def add(
        self,
        layer: int,
        step: Step,
        probabilities: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Add what one layer's entries were worth.

        Args:
            layer: Its number.
            step: The step of the queries.
            probabilities: `[n, kv heads, group, q, columns]` float32.
            values: `[n, kv heads, columns, head size]`.
            output: `[n, kv heads, group, q, head size]`.
        """
        columns, head_size = values.shape[-2:]
        numbers = probabilities.numel() // len(values) // self._unit * head_size
        size = max(1, _MOST_NUMBERS // numbers)
        for begin in range(0, len(values), size):
            rows = slice(begin, begin + size)
            weights = probabilities[rows].unflatten(-1, (-1, self._unit))
            tokens = values[rows].unflatten(2, (-1, self._unit))
            parts = torch.einsum("nhgqeu,nheud->nhgqed", weights.to(tokens), tokens)
            if self._is_error:
                mass = weights.sum(-1, keepdim=True)
                whole = output[rows].unsqueeze(-2).float()
                # nothing is left to compare with where an entry has all of the mass
                parts = (mass * whole - parts) / (1 - mass).clamp_min(1e-3)
            worth = parts.float().norm(dim=-1).mean(2)
            worth *= step.real[rows, None, :, None]
            peaks = self.peaks[layer, rows, :, : columns // self._unit]
            torch.maximum(peaks, worth.amax(2), out=peaks)

    def keep(self, entries: torch.Tensor, alive: torch.Tensor) -> None:
        """Drop entries; arguments as for `Statistics.keep`."""
        index = entries.expand(*self.peaks.shape[:-1], -1)
        kept = self.peaks.gather(-1, index) * alive
        self.peaks.zero_()
        self.peaks[..., : kept.shape[-1]] = kept
