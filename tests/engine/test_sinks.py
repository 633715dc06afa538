# SPDX-License-Identifier: Apache-2.0
"""A model's attention sinks; of evictions with them, see `test_architectures`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.engine.engines import running_engine
from tests.engine.model_sinks import check_against_stock
from tests.engine.tiny_models import TINY_BUDGET, random_prompt, save_tiny_model

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def tiny_gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("gpt-oss", tmp_path_factory.mktemp("tiny-gpt-oss"))


def test_they_count_as_stock_vllms_do(tiny_gpt_oss: Path) -> None:
    check_against_stock(partial(running_engine, tiny_gpt_oss))


@pytest.mark.usefixtures("engine_lock")
def test_each_rank_has_those_of_its_heads(tiny_gpt_oss: Path) -> None:
    # 90 tokens in the end, and the first eviction comes at 96
    prompts = [random_prompt(length, seed=length) for length in (60, 33)]
    tokens = []
    for size in (1, 2):
        with running_engine(
            tiny_gpt_oss,
            TINY_BUDGET,
            tensor_parallel_size=size,
            distributed_executor_backend="mp" if size > 1 else None,
        ) as engine:
            tokens.append(engine.generate(prompts, 30))
    assert tokens[0] == tokens[1]
