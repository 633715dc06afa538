# SPDX-License-Identifier: Apache-2.0
"""A request that begins behind another's prefix ends as if it had read all of it.

In float32 the tokens and every byte of its live pages are the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.engines import running_engine
from tests.engine.final_pages import Ending
from tests.engine.prefix_hits import check_crowd, check_one_by_one, without_hits
from tests.engine.tiny_models import SMALL_BUDGET
from tests.oracle import Options
from vllm_roco.scheduler import RocoAsyncScheduler

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=["roco", "recent"])
def options(request: pytest.FixtureRequest) -> Options:
    return replace(SMALL_BUDGET, policy=request.param)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, options: Options) -> dict[str, Ending]:
    return without_hits(tiny_llama, options)


def test_one_by_one(
    tiny_llama: Path, options: Options, expected: dict[str, Ending]
) -> None:
    with running_engine(tiny_llama, options, enable_prefix_caching=True) as engine:
        check_one_by_one(engine, expected)


@pytest.mark.parametrize("pool", [512, 46], ids=["large-pool", "small-pool"])
def test_all_at_once(
    tiny_llama: Path, options: Options, expected: dict[str, Ending], pool: int
) -> None:
    check_crowd(tiny_llama, options, expected, pool)


@pytest.mark.parametrize("pool", [512, 46], ids=["large-pool", "small-pool"])
def test_all_at_once_asynchronously(
    tiny_llama: Path,
    options: Options,
    expected: dict[str, Ending],
    pool: int,
    asynchronous: None,
) -> None:
    check_crowd(tiny_llama, options, expected, pool, RocoAsyncScheduler)
