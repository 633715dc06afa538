# SPDX-License-Identifier: Apache-2.0
"""Short soaks of two ranks; `python -m tests.soak --tensor-parallel-size 2` is long."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.every_form import only_with_every_form
from tests.quick_start.nursery import UNCOMPILED
from tests.soak.engines import Host, soak_in_process
from tests.soak.run import Plan
from tests.soak.setups import SERVER

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PLAN = Plan(
    num_requests=40,
    num_canaries=2,
    seed=5,
    concurrency=24,
    time_limit=120,
    exact=True,
    server=SERVER,
    # as many at once as preempt each other
    num_parts=2,
)


@pytest.mark.parametrize(
    ("tensor", "pipeline"),
    [
        pytest.param(2, 1, id="tensor"),
        pytest.param(1, 2, id="pipeline", marks=only_with_every_form),
    ],
)
def test_ranks_read_the_same_tables_and_keep_what_they_must(
    tensor: int,
    pipeline: int,
    engine_processes: None,
    smollm2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tensor > 1:
        # as in `running_engine`; stages need it
        monkeypatch.setenv(UNCOMPILED, "1")
    host = Host(folder=tmp_path, tensor=tensor, pipeline=pipeline)
    report = asyncio.run(soak_in_process(host, PLAN, print))
    print(report.table())
    assert report.faults == []
    first, second = report.ranks
    assert first == second
    assert first["steps that evict"] > 0
    assert report.audit["counts"]["poisoned blocks"] > 0
    assert report.canaries["equal"] == PLAN.num_canaries
