# SPDX-License-Identifier: Apache-2.0
"""A data-parallel rank without work replays the graphs of ranks that have some.

As `tests/engine/test_dummy_batch.py`, with graphs and both of vLLM's runners for GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.dummy_batches import dummy_batch_after_each_step
from tests.engine.test_dummy_batch import WORK
from tests.engine.test_request_options import SERVER, generate
from tests.engine.tiny_models import SMALL_BUDGET, TINY_BUDGET, random_prompt
from tests.gpu.engines import RUNS, gpu_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

PROMPT = random_prompt(70, seed=1)
NUM_NEW = 120


def test_dummy_batches_leave_the_cache_alone(tiny_llama: Path) -> None:
    """The step before may have evicted; replaying it must not evict again."""
    with gpu_engine(tiny_llama, TINY_BUDGET, async_scheduling=False) as engine:
        expected = engine.generate([PROMPT], NUM_NEW)
        with dummy_batch_after_each_step(engine) as evicted:
            assert engine.generate([PROMPT], NUM_NEW) == expected
        assert sum(map(bool, evicted)) > 1


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_requests_with_options_never_notice(
    tiny_llama: Path,
    run: dict[str, Any],
    runner: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first runner wrote a query that nobody had asked into a request's page."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner == "v2")))
    options = {"additional_config": {"roco": SERVER}, "max_num_seqs": 20}
    with gpu_engine(tiny_llama, SMALL_BUDGET, **options, **run) as engine:
        expected = generate(engine, WORK)
        with dummy_batch_after_each_step(engine) as evicted:
            assert generate(engine, WORK) == expected
        assert sum(map(bool, evicted)) > 5
        assert engine.num_lost_blocks == 0
