# SPDX-License-Identifier: Apache-2.0
"""Which entries go: a rule's two stages, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F

from benchmarks.quality.oracle.rule import Rule
from benchmarks.quality.oracle.statistics import Statistics

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Due:
    """How many entries of each sequence go, and how many there are.

    Attributes:
        computed: Tokens of each sequence computed so far.
        live: Tokens of each that are live.
        going: Tokens of each that go: whole entries.
        budget: Tokens that are kept.
    """

    computed: Sequence[int]
    live: Sequence[int]
    going: Sequence[int]
    budget: int


def choose_survivors(
    rule: Rule,
    due: Due,
    first: torch.Tensor,
    statistics: Statistics | None,
    seeds: Sequence[int],
    further: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> torch.Tensor:
    """Choose who stays; ties go against the older.

    Args:
        rule: How.
        due: How many go.
        first: `[layers or 1, n, kv heads or 1, entries]` int64, the position of each
            entry's first token; older entries come first.
        statistics: Of all entries; a rule that measures nothing needs none.
        seeds: One of each sequence, for the rule `random`.
        further: What else is known of the entries, `[layers, n, kv heads, entries or
            more]` float32, by the statistic's name.

    Returns:
        Bool in the shape of `first`; false for what goes and where no entry lives.
    """
    computed, live, going = (
        torch.tensor(values, device=first.device)[:, None, None]
        for values in (due.computed, due.live, due.going)
    )
    budget, victims = due.budget // rule.unit, going // rule.unit
    entry = torch.arange(first.shape[-1], device=first.device)
    # the newest entry may still be filling
    whole = entry < live // rule.unit
    exposed = (
        whole & (first >= rule.sink) & (first + rule.unit <= computed - rule.recent)
    )
    if rule.candidates == "home":
        exposed &= entry < budget + victims

    def shared(name: str, heads: str) -> torch.Tensor:
        assert statistics is not None
        value = further.get(name)
        if value is None:
            value = statistics.value(name)
        value = value[..., : len(entry)]
        return _shared(rule, heads, _normalised(rule, value, whole))

    if rule.shield != "none":
        candidates = exposed.sum(-1, keepdim=True)
        shielded = int(rule.shield_ratio * budget)
        left = (candidates if rule.exposed == "candidates" else budget) - shielded
        left = torch.as_tensor(left).maximum(victims)
        shield = shared(rule.shield, rule.shield_heads)
        if rule.neighbours:
            shield = _lent(shield, first, rule)
        exposed = _rank(shield.masked_fill(~exposed, torch.inf)) < left

    if rule.second == "age":
        second = first.float()
    elif rule.second == "random":
        second = _random(first.shape, rule.unit, due, seeds).to(first.device)
    else:
        second = shared(rule.second, rule.second_heads)
    order = _rank(second.masked_fill(~exposed, torch.inf))
    if rule.age_weight:
        by_age = _rank((~exposed).int())
        mixed = torch.lerp(order.float(), by_age.float(), rule.age_weight)
        order = _rank(mixed.masked_fill(~exposed, torch.inf))
    alive = entry < -(-live // rule.unit)
    return (order >= victims) & alive


def _normalised(rule: Rule, value: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Make the values of different heads comparable.

    Args:
        rule: How.
        value: `[layers, n, kv heads, entries]`.
        whole: `[n, 1, entries]` bool; what is not whole does not count.
    """
    value = value.where(whole, 0)
    if rule.normalise == "share":
        return value / value.sum(-1, keepdim=True).clamp_min(_TINY)
    if rule.normalise == "rank":
        return _rank(value.where(whole, torch.inf)).float()
    if rule.normalise == "zscore":
        number = whole.sum(-1, keepdim=True)
        value = value - value.sum(-1, keepdim=True) / number
        square = value.square().where(whole, 0).sum(-1, keepdim=True)
        return value / (square / number).sqrt().clamp_min(_TINY)
    return value


def _shared(rule: Rule, heads: str, value: torch.Tensor) -> torch.Tensor:
    """Return one value for those who share a choice.

    Args:
        rule: Who shares.
        heads: What stands for the heads that share.
        value: `[layers, n, kv heads, entries]`.

    Returns:
        `[layers or 1, n, kv heads or 1, entries]`.
    """
    if rule.scope == "head":
        return value
    dims = (2,) if rule.scope == "layer" else (0, 2)
    if heads == "max":
        return value.amax(dims, keepdim=True)
    if heads == "mean":
        return value.mean(dims, keepdim=True)
    if heads == "rms":
        return value.square().mean(dims, keepdim=True).sqrt()
    if rule.scope == "all":
        value = value.permute(1, 0, 2, 3).flatten(1, 2)[None]
    largest = value.topk(min(rule.top_heads, value.shape[2]), dim=2).values
    return largest.mean(2, keepdim=True)


def _lent(value: torch.Tensor, first: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Return at least a share of what the entries beside each in the text have.

    Args:
        value: `[layers or 1, n, kv heads or 1, entries]`, older entries first.
        first: Positions of the entries' first tokens, in the same shape.
        rule: How much of it.
    """
    adjacent = first.diff() == rule.unit
    from_behind = F.pad(value[..., 1:] * adjacent, (0, 1))
    from_before = F.pad(value[..., :-1] * adjacent, (1, 0))
    return value.maximum(rule.neighbours * from_behind.maximum(from_before))


def _rank(values: torch.Tensor) -> torch.Tensor:
    """Return each value's place along the last dimension; ties keep their order."""
    order = values.argsort(dim=-1, stable=True)
    places = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, places)


def _random(
    shape: torch.Size, unit: int, due: Due, seeds: Sequence[int]
) -> torch.Tensor:
    """Return uniform numbers that do not depend on who else is in the batch."""
    generator = torch.Generator()
    numbers = torch.zeros(shape)
    layers, _, heads, _ = shape
    for i, (computed, live, seed) in enumerate(
        zip(due.computed, due.live, seeds, strict=True)
    ):
        generator.manual_seed(seed + computed)
        entries = -(-live // unit)
        drawn = torch.rand(layers, heads, entries, generator=generator)
        numbers[:, i, :, :entries] = drawn
    return numbers
