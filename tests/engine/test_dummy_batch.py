# SPDX-License-Identifier: Apache-2.0
"""An idle rank's batches change nothing of requests, whatever options these have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.dummy_batches import dummy_batch_after_each_step
from tests.engine.engines import Engine, running_engine
from tests.engine.test_request_options import OWN, PROMPTS, SERVER, generate
from tests.engine.tiny_models import SMALL_BUDGET
from vllm_roco.scheduler import RocoAsyncScheduler

pytestmark = pytest.mark.engine

WORK = [(name, PROMPTS[0]) for name in OWN]


def as_in_a_graph(engine: Engine) -> None:
    """Run a dummy batch that attends, as vLLM's first runner does where it has graphs.

    In its block table are the requests that it had in the step before.
    """
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    runner._dummy_run(len(WORK), uniform_decode=True, force_attention=True)


@pytest.mark.parametrize("run", [None, as_in_a_graph], ids=["eager", "as-in-a-graph"])
def test_requests_with_options_never_notice(
    tiny_llama: Path, asynchronous: None, run: object
) -> None:
    """It wrote a query that nobody had asked into statistics of requests' pages."""
    with running_engine(
        tiny_llama, SMALL_BUDGET, additional_config={"roco": SERVER}, max_num_seqs=20
    ) as engine:
        assert isinstance(engine.scheduler, RocoAsyncScheduler)
        expected = generate(engine, WORK)
        with dummy_batch_after_each_step(engine, run) as evicted:
            assert generate(engine, WORK) == expected
        assert sum(map(bool, evicted)) > 5
        assert engine.num_lost_blocks == 0
