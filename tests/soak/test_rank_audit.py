# SPDX-License-Identifier: Apache-2.0
"""A rank's file tells what it has kept, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.rig import Rig, Shape
from tests.soak.audit import Table
from tests.soak.rank_audit import RankAudit
from tests.soak.rank_steps import Step, from_json
from vllm_roco.attention.cpu import eviction, impl, metadata
from vllm_roco.kv_cache.page import NUM_QUERIES, page_view, statistics_view

SINK, RECENT, SIZE = 16, 16, 16
# B 4 and S 2: 96 tokens evict two blocks
SHAPE = Shape(budget_blocks=4, options={"sink": SINK, "recent": RECENT})
Tables = dict[str, Table]


@pytest.fixture
def rig() -> Iterator[Rig]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Rig(SHAPE)
    torch.set_num_threads(threads)


def steps_of(
    rig: Rig,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Tables], None] | None = None,
) -> list[Step]:
    """Read two prompts of which the first evicts, decode, and return the lines.

    Args:
        rig: An empty one.
        path: For the file.
        monkeypatch: Takes back what the audit watches.
        change: Something else than what the scheduler says.
    """
    for module, name in ((impl, "evict"), (metadata, "sequences_of")):
        monkeypatch.setattr(module, name, getattr(module, name))
    audit = RankAudit(path, lambda: ["long", "short"])
    audit.watch()
    long, short = rig.add(), rig.add()
    for queries in ({long: 90, short: 20}, {long: 6, short: 1}, {long: 1, short: 1}):
        # gives the blocks
        rig.metadata(queries)
        # as the scheduler has it: nothing is left of what was given up
        tables = {
            name: Table(
                [
                    block if block in rig.live_blocks(index) else None
                    for block in rig.rows[index]
                ],
                7,
            )
            for name, index in (("long", long), ("short", short))
        }
        if change is not None:
            change(tables)
        with audit.step(tables):
            rig.step(queries)
    return [from_json(line) for line in path.read_text().splitlines()]


def test_a_sound_rank_has_no_faults(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_of(rig, tmp_path / "rank.jsonl", monkeypatch)
    assert [step.faults for step in steps] == [[]] * 3
    assert [step.requests for step in steps] == [["long", "short"]] * 3
    assert len({step.tables for step in steps}) == 2
    assert [len(step.evictions) for step in steps] == [0, 1, 0]
    (evicted,) = steps[1].evictions
    assert (evicted.request, evicted.num_tokens, evicted.evicted, evicted.alike) == (
        *("long", 96, (0, 2)),
        False,
    )
    assert {SIZE * block for block in rig.sequences[0].kept} - {96} == {*evicted.kept}
    assert evicted.queries == [96 - first for first in evicted.kept]


def another_block(tables: Tables) -> None:
    tables["short"].blocks[0] = 159


def fewer_blocks(tables: Tables) -> None:
    tables["long"].blocks[3] = None


def a_smaller_bound(tables: Tables) -> None:
    tables["long"] = tables["long"]._replace(most_blocks=3)


def another_request(tables: Tables) -> None:
    tables["other"] = tables.pop("short")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (another_block, "short has the row"),
        (fewer_blocks, "which are not its own"),
        (a_smaller_bound, "blocks, at most 3 are its"),
        (another_request, "are in the batch, not"),
    ],
)
def test_tables_are_compared_with_the_scheduler_s(
    change: Callable[[Tables], None],
    says: str,
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = steps_of(rig, tmp_path / "rank.jsonl", monkeypatch, change)
    for step in steps:
        assert any(says in fault for fault in step.faults), step.faults


@pytest.mark.parametrize(
    ("moves", "says"),
    [
        # the oldest two go, and the newest is written over
        (lambda *_: [(5, 0), (4, 1)], "lost [0], which are protected"),
        (lambda *_: [(4, 1)], "lost [80], which are protected"),
        (lambda *_: [(1, 2), (5, 3)], "long kept"),
    ],
)
def test_what_a_rank_keeps_is_looked_at(
    moves: Callable[..., Any],
    says: str,
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eviction, "_moves", moves)
    path = tmp_path / "rank.jsonl"
    # the rig's own comparison fails, behind the step that is looked at
    with pytest.raises((AssertionError, ValueError)):
        steps_of(rig, path, monkeypatch)
    last = from_json(path.read_text().splitlines()[-1])
    assert any(says in fault for fault in last.faults), last.faults


def unmoved(caches: list[torch.Tensor], before: torch.Tensor) -> None:
    page_view(caches[1])[:] = before


def another_count(caches: list[torch.Tensor], before: torch.Tensor) -> None:
    statistics_view(caches[1])[:, 1, NUM_QUERIES] += 1


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(unmoved, "has layers that keep"), (another_count, "has heads that were asked")],
)
def test_layers_of_a_rank_must_do_the_same(
    spoil: Callable[[list[torch.Tensor], torch.Tensor], None],
    says: str,
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_all = eviction.evict

    def in_one_layer(sequence: Any, caches: Any, *rest: Any, **how: Any) -> int:
        before = page_view(caches[1]).clone()
        moved = by_all(sequence, caches, *rest, **how)
        spoil(caches, before)
        return moved

    monkeypatch.setattr(impl, "evict", in_one_layer)
    path = tmp_path / "rank.jsonl"
    with pytest.raises((AssertionError, ValueError)):
        steps_of(rig, path, monkeypatch)
    last = from_json(path.read_text().splitlines()[-1])
    assert any(says in fault for fault in last.faults), last.faults
