# SPDX-License-Identifier: Apache-2.0
"""The live keys and values of a batch of sequences, and attention over them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from benchmarks.quality.oracle.eviction_method import EvictionMethod
from benchmarks.quality.oracle.output_peaks import OutputPeaks
from benchmarks.quality.oracle.rule import PEAKS_OF_OUTPUT
from benchmarks.quality.oracle.selection import Due, choose_survivors
from benchmarks.quality.oracle.statistics import Statistics
from benchmarks.quality.oracle.step import Step, make_step


class LiveBatch:
    """What a batch of sequences remembers, and which of it lives on.

    A sequence's live tokens lie in its first slots, oldest first; layers and heads may
    hold different tokens, but always equally many. Use per step: `begin_step`, one
    `attend` per layer, then `evict`.

    Attributes:
        computed: Tokens of each sequence computed so far.
        positions: `[layers or 1, n, kv heads or 1, slots]` int64, of each slot's token,
            in the shape of the method's choices.
    """

    def __init__(
        self,
        method: EvictionMethod,
        config: PreTrainedConfig,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Start empty.

        Args:
            method: What lives on.
            config: Of the model.
            prompts: One for each sequence; of interest to the method `random` alone.
            num_tokens: Most tokens that a sequence will have.
            device: Where everything lives.
            dtype: Of keys and values.
        """
        self._method = method
        self._rule = method.rule
        self._device = device
        self._seeds = [zlib.crc32(bytes(str(list(ids)), "ascii")) for ids in prompts]
        layers, heads, head_size = cache_shape(config)
        num = len(prompts)
        # whole entries, and a last slot for the padding's keys
        entries = -(-method.most_live_tokens(num_tokens) // self._rule.unit) + 1
        slots = entries * self._rule.unit
        self._keys = torch.zeros(
            layers, num, heads, slots, head_size, dtype=dtype, device=device
        )
        self._values = torch.zeros_like(self._keys)
        self.positions = torch.zeros(
            layers if self._rule.scope != "all" else 1,
            num,
            heads if self._rule.scope == "head" else 1,
            slots,
            dtype=torch.int64,
            device=device,
        )
        self._statistics: Statistics | None = None
        if self._rule.measures:
            shape = (layers, num, heads, entries)
            self._statistics = Statistics(self._rule, shape, device)
        self._output_peaks: OutputPeaks | None = None
        if self._rule.shield in PEAKS_OF_OUTPUT:
            self._output_peaks = OutputPeaks(
                self._rule.shield,
                self._rule.unit,
                (layers, num, heads, entries),
                device,
            )
        self.computed = [0] * num
        self._counts: list[int] = []
        self._step: Step | None = None

    @property
    def live(self) -> list[int]:
        """Live tokens of each sequence."""
        return [n - self._method.evicted_tokens(n) for n in self.computed]

    def begin_step(self, counts: Sequence[int]) -> Step:
        """Make room for a step's tokens.

        Args:
            counts: How many tokens each sequence reads.
        """
        step = make_step(
            self.computed,
            counts,
            self.live,
            unit=self._rule.unit,
            capacity=self.positions.shape[-1],
            device=self._device,
        )
        shape = (*self.positions.shape[:3], step.width)
        self.positions.scatter_(
            -1,
            step.slots[:, None].expand(shape),
            step.positions[:, None].expand(shape),
        )
        if self._statistics:
            self._statistics.begin_step(step, self._method.budget)
        self._counts = list(counts)
        self._step = step
        return step

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attend over the live tokens, the step's own included, and measure.

        Args:
            layer: Its number.
            query: `[n, query heads, q, head size]`, rotated.
            key: `[n, kv heads, q, head size]`, rotated.
            value: `[n, kv heads, q, head size]`.
            scale: Factor on the logits.

        Returns:
            `[n, q, query heads, head size]`.
        """
        step = self._step
        assert step is not None
        slots = step.slots[:, None, :, None].expand(key.shape)
        self._keys[layer].scatter_(2, slots, key)
        self._values[layer].scatter_(2, slots, value)
        keys = self._keys[layer, :, :, : step.columns]
        values = self._values[layer, :, :, : step.columns]

        # the group of a kv head as so many more queries
        group = query.shape[1] // key.shape[1]
        queries = query.unflatten(1, (-1, group)).flatten(2, 3)
        output: torch.Tensor
        if self._statistics:
            logits = (queries @ keys.mT).float().unflatten(2, (group, -1)) * scale
            hidden = ~step.visible[:, None, None]
            logits.masked_fill_(hidden, torch.finfo(torch.float32).min)
            probabilities = logits.softmax(-1)
            self._statistics.add(layer, probabilities)
            output = probabilities.flatten(2, 3).to(values.dtype) @ values
            if self._output_peaks:
                by_query = output.unflatten(2, (group, -1))
                self._output_peaks.add(layer, step, probabilities, values, by_query)
        else:
            visible = step.visible.repeat(1, group, 1)[:, None]
            output = F.scaled_dot_product_attention(
                queries, keys, values, visible, scale=scale
            )
        output = output.unflatten(2, (group, -1)).flatten(1, 2)
        return output.transpose(1, 2)

    def evict(self) -> None:
        """End the step: drop what the schedule says is due."""
        step, rule = self._step, self._rule
        assert step is not None
        grown = [n + c for n, c in zip(self.live, self._counts, strict=True)]
        self.computed = [
            n + c for n, c in zip(self.computed, self._counts, strict=True)
        ]
        live = self.live
        going = [n - kept for n, kept in zip(grown, live, strict=True)]
        if not any(going):
            return
        stay = choose_survivors(
            rule,
            Due(self.computed, grown, going, self._method.budget),
            self.positions[..., : step.columns : rule.unit],
            self._statistics,
            self._seeds,
            self._further(step.columns, grown),
        )
        kept_entries = -(-max(live) // rule.unit)
        # a stable sort puts those that stay first, in order
        entries = (~stay).int().argsort(dim=-1, stable=True)[..., :kept_entries]
        self._compact(entries)
        if self._statistics:
            number = torch.tensor(live, device=self._device)[:, None, None]
            entry = torch.arange(kept_entries, device=self._device)
            self._statistics.keep(entries, entry * rule.unit < number)
            if self._output_peaks:
                self._output_peaks.keep(entries, entry * rule.unit < number)

    def _further(self, columns: int, grown: list[int]) -> dict[str, torch.Tensor]:
        """Return what the rule wants beyond the statistics, by name."""
        further = {}
        if self._output_peaks:
            further[self._rule.shield] = self._output_peaks.peaks
        if "contribution" in (self._rule.shield, self._rule.second):
            assert self._statistics is not None
            distances = self._distances(columns, grown)
            peak = self._statistics.value("peak")[..., : distances.shape[-1]]
            further["contribution"] = peak * distances
        return further

    def _distances(self, columns: int, grown: list[int]) -> torch.Tensor:
        """Return how far each entry's mean value lies from the whole entries' mean.

        Args:
            columns: Slots that are in use, a multiple of the unit.
            grown: Tokens of each sequence that live before anything goes.
        """
        values = self._values[..., :columns, :].float()
        means = values.unflatten(3, (-1, self._rule.unit)).mean(4)
        whole = torch.tensor(grown, device=self._device) // self._rule.unit
        number = whole[:, None, None, None]
        entry = torch.arange(means.shape[3], device=self._device)[:, None]
        centre = means.where(entry < number, 0).sum(3, keepdim=True) / number
        distances: torch.Tensor = (means - centre).norm(dim=-1)
        return distances

    def _compact(self, entries: torch.Tensor) -> None:
        """Move the entries that stay to the front, in every layer and head."""
        inside = torch.arange(self._rule.unit, device=self._device)
        slots = (entries[..., None] * self._rule.unit + inside).flatten(-2)
        num_slots = slots.shape[-1]
        self.positions[..., :num_slots] = self.positions.gather(-1, slots)
        layers, num, heads, _, head_size = self._keys.shape
        for layer, index in enumerate(slots.expand(layers, -1, -1, -1)):
            index = index[..., None].expand(num, heads, num_slots, head_size)
            for cache in (self._keys[layer], self._values[layer]):
                cache[:, :, :num_slots] = cache.gather(2, index)


def cache_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Return a model's layers, kv heads and head size."""
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None)
    return (
        text.num_hidden_layers,
        text.num_key_value_heads,
        head_size or text.hidden_size // text.num_attention_heads,
    )
