# SPDX-License-Identifier: Apache-2.0
"""Workers that Ray has placed on two nodes, which share a model's heads or layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engines import running_engine
from tests.engine.kept_positions import recorded_positions
from tests.engine.ray_nodes import NUM_NODES, node_of, running_nodes
from tests.engine.test_parallel_options import PIPELINE
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from vllm_roco.metrics import get_metrics

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.usefixtures("engine_lock"),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="needs Ray: pip install ray"
    ),
]

PROMPTS = [random_prompt(length, seed=length) for length in (200, 130, 40)]
NUM_NEW = 80
BY_SCORES: list[dict[str, Any]] = [
    {"roco_shield": "contribution", "roco_shield_ratio": 1.0},
    {"roco_shield": "peak"},
    {"roco_policy": "h2o"},
]
# whatever layers a stage has
ALIKE: list[dict[str, Any]] = [
    {"roco_policy": "random", "roco_seed": 3},
    {"roco_policy": "recent"},
    {"roco_policy": "random", "roco_seed": 4},
]


@pytest.fixture
def nodes(engine_lock: None) -> Iterator[None]:
    # an engine that is shut down keeps its place in Ray's cluster
    with running_nodes():
        yield


@pytest.mark.parametrize(
    ("parallel", "options"),
    [({"tensor_parallel_size": NUM_NODES}, BY_SCORES), (PIPELINE, ALIKE)],
    ids=["tensor", "pipeline"],
)
def test_nodes_answer_as_one_process(
    parallel: dict[str, Any],
    options: list[dict[str, Any]],
    nodes: None,
    tiny_llama: Path,
) -> None:
    answers, kept, counts = [], [], []
    for settings in ({}, {**parallel, "distributed_executor_backend": "ray"}):
        with running_engine(tiny_llama, SMALL_BUDGET, **settings) as engine:
            with recorded_positions(engine) as recorded:
                answers.append(engine.generate(PROMPTS, NUM_NEW, extra_args=options))
            assert engine.num_lost_blocks == 0
            kept.append([recorded[tuple(prompt)] for prompt in PROMPTS])
            metrics = get_metrics(engine.llm)
            counts.append((metrics.freed_blocks, metrics.moved_blocks))
            if settings:
                its_nodes = engine.core.model_executor.collective_rpc(node_of)
                assert len(set(its_nodes)) == NUM_NODES
    assert answers[1] == answers[0]
    # no worker would have pages to look at without the plugin
    assert kept[1] == [of_one * NUM_NODES for of_one in kept[0]]
    assert counts[1] == counts[0]
    assert min(counts[0]) > 0
