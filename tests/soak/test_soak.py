# SPDX-License-Identifier: Apache-2.0
"""A short soak of a server; `python -m tests.soak` is a long one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.soak.clients import DISTURBANCES
from tests.soak.engines import Host
from tests.soak.run import Plan
from tests.soak.server import soak_server
from tests.soak.setups import SERVER

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PLAN = Plan(
    num_requests=600,
    num_canaries=10,
    seed=0,
    concurrency=48,
    # a busy machine does what it can: half is asked for below
    time_limit=240,
    exact=True,
    server=SERVER,
)


def test_nothing_is_lost_or_wrong_or_let_in(
    engine_lock: None, smollm2: Path, tmp_path: Path
) -> None:
    host = Host(folder=tmp_path)
    report = asyncio.run(soak_server(host, PLAN, print))
    print(report.table())
    assert report.faults == []
    assert report.sent >= PLAN.num_requests // 2
    assert report.audit["freed blocks"] > 0
    assert report.audit["prefixes"]["snapshot_hits"] > 0
    assert report.audit["counts"]["poisoned blocks"] > 0
    assert {0, 200, 400} <= report.statuses.keys()
    assert {*DISTURBANCES} == report.disturbances.keys()
