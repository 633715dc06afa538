# SPDX-License-Identifier: Apache-2.0
"""What the oracle's options measure and how they choose, from the definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.quality.oracle.rule import Rule
from benchmarks.quality.oracle.selection import Due, choose_survivors
from benchmarks.quality.oracle.statistics import Statistics
from benchmarks.quality.oracle.step import make_step

CPU = torch.device("cpu")
NUM, HEADS, GROUP, UNIT, ENTRIES, BUDGET = 2, 2, 3, 4, 6, 8
# tokens that each of two sequences reads in each of three steps
STEPS = ((5, 5), (7, 3), (4, 6))

pytestmark = pytest.mark.usefixtures("one_thread")


def run_steps(rule: Rule) -> tuple[Statistics, list[list[list[Any]]]]:
    """Measure random attention; return also every query as the definitions want it.

    Returns:
        The statistics, and per sequence its queries: (whether the step ends past the
        budget, queries that follow in the step, `[kv heads, entries]` received,
        `[entries]` seen).
    """
    generator = torch.Generator().manual_seed(0)
    statistics = Statistics(rule, (1, NUM, HEADS, ENTRIES), CPU)
    queries: list[list[list[Any]]] = [[] for _ in range(NUM)]
    computed = [0] * NUM
    for counts in STEPS:
        step = make_step(
            computed, counts, computed, unit=UNIT, capacity=UNIT * ENTRIES, device=CPU
        )
        weights = torch.rand(
            NUM, HEADS, GROUP, step.width, step.columns, generator=generator
        )
        weights *= step.visible[:, None, None]
        statistics.begin_step(step, BUDGET)
        statistics.add(0, weights)
        for i, count in enumerate(counts):
            for j in range(step.width - count, step.width):
                tokens = torch.zeros(HEADS, UNIT * ENTRIES)
                tokens[:, : step.columns] = weights[i, :, :, j].mean(1)
                entries = tokens.unflatten(-1, (-1, UNIT))
                received = entries.sum(-1) if rule.inside == "sum" else entries.amax(-1)
                place = computed[i] + j - (step.width - count)
                seen = torch.arange(ENTRIES) * UNIT <= place
                full = computed[i] + count > BUDGET
                queries[i].append([full, step.width - 1 - j, received, seen])
        computed = [n + count for n, count in zip(computed, counts, strict=True)]
    return statistics, queries


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inside": "max"},
        {"peak_queries": 3},
        {"fade": 0.9},
        {"fade": 0.8, "peak_queries": 2},
        {"forget": 0.9},
        {"query_every": 2},
        {"query_last": 2},
        {"start": "full"},
    ],
    ids=str,
)
def test_statistics_follow_their_definitions(options: dict[str, Any]) -> None:
    rule = Rule(unit=UNIT, **options)
    statistics, queries = run_steps(rule)
    values = {
        name: statistics.value(name)
        for name in ("mean", "deviation", "peak", "sum", "rms", "focus")
    }
    for i in range(NUM):
        total, squares, count = torch.zeros(3, HEADS, ENTRIES).unbind()
        peaks = [torch.zeros(HEADS, ENTRIES)] * rule.peak_queries
        for age, (full, later, received, seen) in enumerate(reversed(queries[i])):
            if (
                (rule.start == "full" and not full)
                or later % rule.query_every
                or (rule.query_last and later >= rule.query_last)
            ):
                continue
            weight = rule.forget**age
            total = total + weight * received
            squares = squares + weight * received.square()
            count = count + weight * seen
            peaks.append(rule.fade**age * received)
        mean = torch.where(count > 0, total / count, 0)
        square = torch.where(count > 0, squares / count, 0)
        largest = torch.stack(peaks).sort(dim=0, descending=True).values
        expected = {
            "mean": mean,
            "deviation": (square - mean.square()).clamp_min(0).sqrt(),
            "peak": largest[: rule.peak_queries].mean(0),
            "sum": total,
            "rms": square.sqrt(),
            "focus": torch.where(total > 0, squares / total, 0),
        }
        for name, value in expected.items():
            torch.testing.assert_close(
                values[name][0, i], value, atol=1e-3, rtol=1e-4, msg=name
            )


def survivors(peaks: torch.Tensor, **options: Any) -> list[int]:
    """Choose 4 of 6 tokens in one sequence, by peaks of `[layers, kv heads, 6]`."""
    rule = Rule(**({"scope": "all", "second": "peak"} | options))
    layers, heads, tokens = peaks.shape
    statistics = Statistics(rule, (layers, 1, heads, tokens), CPU)
    statistics.fields[:, 4:, 0] = peaks[:, None]
    due = Due([tokens], [tokens], [2], budget=tokens - 2)
    first = torch.arange(tokens).expand(1, 1, 1, -1)
    stay = choose_survivors(rule, due, first, statistics, seeds=[0])
    assert stay.shape == first.shape
    return stay.flatten().nonzero()[:, 0].tolist()


class TestSharing:
    """Two layers of two heads; one head is alone in what it wants."""

    peaks = torch.tensor(
        [
            [[8.0, 7, 6, 5, 4, 3], [8.0, 7, 6, 5, 4, 3]],
            [[8.0, 7, 6, 5, 4, 3], [0.0, 0, 0, 0, 0, 1]],
        ]
    )

    def test_any_head_is_enough(self) -> None:
        assert survivors(self.peaks) == [0, 1, 2, 5]

    def test_rms_hears_a_loud_head(self) -> None:
        assert survivors(self.peaks, second_heads="rms") == [0, 1, 2, 5]

    def test_the_mean_of_raw_values_outvotes_it(self) -> None:
        kept = survivors(self.peaks, second_heads="mean", normalise="none")
        assert kept == [0, 1, 2, 3]

    def test_several_heads_are_asked_for(self) -> None:
        options = {"second_heads": "top", "normalise": "none"}
        assert survivors(self.peaks, **options, top_heads=2) == [0, 1, 2, 3]
        loud = self.peaks * torch.tensor([[[1.0], [1.0]], [[1.0], [99.0]]])
        assert survivors(loud, **options, top_heads=2) == [0, 1, 2, 5]

    def test_a_rank_gives_every_head_the_same_voice(self) -> None:
        # the lone head ranks 5 first and then by age, as all its others are equal
        kept = survivors(self.peaks, normalise="rank")
        assert kept == [0, 1, 4, 5]

    def test_zscores_hear_what_stands_out(self) -> None:
        assert 5 in survivors(self.peaks, normalise="zscore")


class TestStages:
    peaks = torch.tensor([[[1.0, 2, 3, 6, 5, 4]]])

    def test_age_alone(self) -> None:
        assert survivors(self.peaks, second="age") == [2, 3, 4, 5]

    def test_age_and_statistic_count_by_rank(self) -> None:
        falling = self.peaks.flip(-1)
        assert survivors(falling) == [0, 1, 2, 3]
        assert survivors(falling, age_weight=1.0) == [2, 3, 4, 5]
        # ranks: 3+0, 4+1, 5+2, 2+3, 1+4, 0+5
        assert survivors(falling, age_weight=0.5) == [2, 3, 4, 5]
        assert survivors(falling, age_weight=0.4) == [1, 2, 3, 4]

    def test_the_shield_comes_first(self) -> None:
        kept = survivors(
            self.peaks.flip(-1), second="age", shield="peak", shield_ratio=0.5
        )
        # the budget is 4: two are shielded, 2 and 1
        assert kept == [1, 2, 4, 5]

    def test_exposed_of_the_budget_shields_what_is_over_it_too(self) -> None:
        options = {"second": "age", "shield": "peak", "exposed": "budget"}
        # 4 - 1 = 3 are exposed: those with the smallest peaks, 0, 1 and 2
        assert survivors(self.peaks, **options, shield_ratio=0.25) == [2, 3, 4, 5]
        falling = self.peaks.flip(-1)
        assert survivors(falling, **options, shield_ratio=0.25) == [0, 1, 2, 5]

    def test_ends_are_spared(self) -> None:
        assert survivors(self.peaks, sink=2, second="age") == [0, 1, 4, 5]
        assert survivors(self.peaks.flip(-1), recent=2) == [1, 2, 4, 5]


def test_equal_values_go_oldest_first() -> None:
    assert survivors(torch.ones(1, 1, 6)) == [2, 3, 4, 5]
