# SPDX-License-Identifier: Apache-2.0
"""One engine serves the batches of a workload, call by call of a benchmark."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from vllm import LLM
from vllm.benchmarks import latency

from benchmarks.rows import read
from benchmarks.serving import serve_workloads
from benchmarks.serving.engines import Engine, Requests
from benchmarks.serving.jobs import MACHINE, Session
from benchmarks.serving.shared_engine import SharedEngine
from benchmarks.serving.vllm_bench import call, latency_command
from benchmarks.serving.workloads import runs

BATCH = Requests(1, 8, 4)
Measure = Callable[[], Mapping[str, object]]


REQUESTS, TOKENS = "vllm:request_success_total", "vllm:generation_tokens_total"
PROMPT_TOKENS = "vllm:prompt_tokens_total"


def counts() -> Mapping[str, float]:
    """Return what the engine that runs has served so far."""
    found = dict.fromkeys((REQUESTS, TOKENS, PROMPT_TOKENS), 0.0)
    for metric in REGISTRY.restricted_registry(list(found)).collect():
        for sample in metric.samples:
            if sample.name in found:
                found[sample.name] += sample.value
    return found


def engines() -> set[int | None]:
    """Return the process ids of the engines that run."""
    return {process.pid for process in multiprocessing.active_children()}


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("engine_processes")
@pytest.mark.timeout(900)
def test_batches_share_an_engine_and_survive_its_death(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed call once would have cost every later row of its engine.

    The second batch comes again after the death, alone with its engine.
    """
    common = [f"--tokenizer={smollm2}", "--enforce-eager"]
    selected = runs("smoke", variants=["stock"], baseline="CPU_ATTN")
    ((first, second),) = serve_workloads.jobs(selected, common)
    served: list[set[int | None]] = []
    counted: list[Mapping[str, float]] = []

    def noted(measure: Measure) -> Mapping[str, object]:
        before = counts()
        row = measure()
        counted.append({name: n - before[name] for name, n in counts().items()})
        served.append(engines())
        return row

    def killed(measure: Measure) -> Mapping[str, object]:
        (process,) = engines()
        assert process is not None
        os.kill(process, signal.SIGKILL)
        return measure()

    changes = (noted, noted, killed, noted)
    batches = (first, second, first, second)
    steps = [
        # a row that is there already is not measured again
        (
            {**columns, "shield": n},
            lambda measure=measure, change=change: change(measure),
        )
        for n, ((columns, measure), change) in enumerate(
            zip(batches, changes, strict=True)
        )
    ]
    session = Session(out=tmp_path, facts=dict.fromkeys(MACHINE, ""), time_limit=1e9)
    assert session.run(serve_workloads.TABLE, [steps]) == 1
    assert "EngineDeadError" in capsys.readouterr().err

    one, same, other = served
    assert len(one) == len(other) == 1
    assert one == same != other
    assert not engines()
    rows = read(tmp_path / "serving.csv")
    assert rows["max_running"].tolist() == [4, 2, 2]
    # what a call serves does not depend on who has used the engine before
    _, shared, alone = counted
    assert shared == alone
    batch = selected[1].requests
    warm_up = serve_workloads.warm_up(batch)
    assert shared[REQUESTS] == batch.count + warm_up.count
    assert shared[TOKENS] == (
        batch.count * batch.output_len + warm_up.count * warm_up.output_len
    )


def test_an_engine_that_does_not_start_is_tried_once(smollm2: Path) -> None:
    maker = LLM.__dict__["from_engine_args"]
    causes: list[BaseException | None] = []
    with SharedEngine():
        for kv_cache_dtype, message in (
            ("auto", "the engine does not start"),
            ("auto", "the engine does not start"),
            ("fp8", "another kv_cache_dtype='fp8'"),
        ):
            engine = Engine(
                model="smollm2-135m",
                batches=(BATCH,),
                stock="CPU_ATTN",
                kv_cache_dtype=kv_cache_dtype,
                gpu_memory_utilization=0.3,
            )
            # longer than the model
            common = [f"--tokenizer={smollm2}", "--max-model-len=100000"]
            command = engine.command(common)
            with pytest.raises((RuntimeError, ValueError), match=message) as error:
                call(latency, [*command, *latency_command(BATCH)])
            causes.append(error.value.__cause__)
    assert [cause is not None for cause in causes] == [True, False, False]
    assert LLM.__dict__["from_engine_args"] is maker
