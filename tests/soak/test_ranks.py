# SPDX-License-Identifier: Apache-2.0
"""What is said of ranks that do the same, and of those that do not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.soak import ranks
from tests.soak.rank_steps import Eviction, Step, from_json, rank_file
from tests.soak.ranks import Ranks, differences


def eviction(*, alike: bool = False) -> Eviction:
    return Eviction("a", 96, (2, 3), alike, [0, 48, 64], [96, 48, 32])


def step(number: int = 7, *, alike: bool = False) -> Step:
    return Step(number, ["a", "b"], 12345, [eviction(alike=alike)])


def write(audit: Path, *of_ranks: list[Step]) -> None:
    for rank, steps in enumerate(of_ranks):
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in steps)
        rank_file(audit, rank).write_text(lines)


def test_a_step_survives_its_file() -> None:
    assert from_json(json.dumps(asdict(step()))) == step()


def test_what_is_new_is_compared(tmp_path: Path) -> None:
    audit, steps = tmp_path / "audit.json", [step(number) for number in range(3)]
    compared = Ranks(audit, tensor=2, pipeline=1, agree=True)
    write(audit, steps, steps)
    assert asyncio.run(compared.compare()) == []
    another = step(3)
    another.tables += 1
    for rank, last in enumerate((step(3), another)):
        with rank_file(audit, rank).open("a") as file:
            file.write(json.dumps(asdict(last)) + "\n")
    (fault,) = asyncio.run(compared.compare())
    assert "step 3, rank 1 has the tables 12346, rank 0 12345" in fault
    expected = {"steps": 4, "steps that evict": 4, "evictions": 4}
    assert compared.counts == [expected] * 2
    assert asyncio.run(compared.compare()) == []


def test_a_rank_that_stays_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_PATIENCE", 0)
    audit = tmp_path / "audit.json"
    write(audit, [step(0), step(1)], [step(0)])
    with rank_file(audit, 1).open("a") as file:
        # what is not written to its end is not read
        file.write(json.dumps(asdict(step(1))))
    compared = Ranks(audit, tensor=1, pipeline=2, agree=True)
    assert asyncio.run(compared.compare()) == ["the ranks have taken [2, 1] steps"]


def of_others(one: Step) -> None:
    one.requests = ["b", "a"]


def other_tables(one: Step) -> None:
    one.tables = 1


def no_eviction(one: Step) -> None:
    one.evictions.clear()


def another_end(one: Step) -> None:
    one.evictions[0].evicted = (2, 4)


def fewer_kept(one: Step) -> None:
    one.evictions[0].kept.pop()


def itself_wrong(one: Step) -> None:
    one.faults.append("a lost [0], which are protected")


@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    ("worse", "says"),
    [
        (of_others, "has the requests"),
        (other_tables, "has the tables"),
        (no_eviction, "evicts"),
        (another_end, "evicts"),
        (fewer_kept, "evicts"),
        (itself_wrong, "protected"),
    ],
)
def test_ranks_must_do_the_same(
    worse: Callable[[Step], None], says: str, tensor: int, agree: bool
) -> None:
    assert not [*differences([step(), step()], tensor, agree=agree)]
    other = step()
    worse(other)
    (fault,) = differences([step(), other], tensor, agree=agree)
    assert "step 7, rank 1" in fault and says in fault


def other_kept(one: Step) -> None:
    one.evictions[0].kept = [0, 32, 64]


def other_queries(one: Step) -> None:
    one.evictions[0].queries = [96, 47, 32]


@pytest.mark.parametrize(
    ("worse", "tensor", "agree", "alike", "is_wrong"),
    [
        (other_kept, 2, True, False, True),
        (other_queries, 2, True, False, True),
        # each by its own heads
        (other_kept, 2, False, False, False),
        # each by its own layers
        (other_kept, 1, True, False, False),
        # by what all ranks know
        (other_kept, 2, False, True, True),
        (other_kept, 1, True, True, True),
    ],
)
def test_who_may_choose_differently(
    worse: Callable[[Step], None],
    tensor: int,
    agree: bool,
    alike: bool,
    is_wrong: bool,
) -> None:
    first, other = step(alike=alike), step(alike=alike)
    worse(other)
    faults = [*differences([first, other], tensor, agree=agree)]
    assert len(faults) == is_wrong


def test_a_stage_is_compared_with_itself() -> None:
    """Four ranks, two stages: what the second keeps differs from the first's."""
    of_ranks = [step() for _ in range(4)]
    other_kept(of_ranks[2])
    other_kept(of_ranks[3])
    assert not [*differences(of_ranks, 2, agree=True)]
    other_queries(of_ranks[3])
    (fault,) = differences(of_ranks, 2, agree=True)
    assert "rank 3 has" in fault and "rank 2" in fault
