# SPDX-License-Identifier: Apache-2.0
"""vLLM understands what the serving benchmarks tell it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm.benchmarks import latency, throughput
from vllm.engine.arg_utils import EngineArgs

from benchmarks.serving import prefill
from benchmarks.serving.vllm_bench import (
    Options,
    engine_command,
    latency_command,
    parsed,
    throughput_command,
)
from benchmarks.serving.workloads import VARIANTS, WORKLOADS, Requests, runs
from vllm_roco.config import RocoConfig

BLOCK_SIZE = 16
MODELS = Path(__file__).parents[2] / "benchmarks" / "models"


def engine(**changes: object) -> list[str]:
    """Return the command of an engine that holds small requests."""
    given: dict[str, object] = {
        "model": "qwen2.5-7b",
        "batches": [Requests(4, 100, 20)],
        "backend": "ROCO",
        "kv_cache_dtype": "auto",
        "roco_options": {},
        "gpu_memory_utilization": 0.5,
        "kv_cache_bytes": None,
        "options": Options(tokenizer=str(MODELS)),
    }
    return engine_command(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload(name: str) -> None:
    for run in runs(name):
        requests = run.requests
        command = engine(
            model=run.workload.model,
            batches=run.workload.batches,
            backend=run.backend,
            kv_cache_dtype=run.variant.kv_cache_dtype,
            roco_options=run.roco_options,
            gpu_memory_utilization=run.gpu_memory_utilization,
            kv_cache_bytes=run.workload.kv_cache_bytes,
        )
        if run.workload.one_at_a_time:
            arguments = parsed(latency, [*command, *latency_command(requests)])
        else:
            arguments = parsed(throughput, [*command, *throughput_command(requests)])
        engine_args = EngineArgs.from_cli_args(arguments)
        assert (Path(engine_args.model) / "config.json").exists()
        assert engine_args.kv_cache_memory_bytes == run.workload.kv_cache_bytes
        assert not engine_args.disable_log_stats
        assert not engine_args.enable_prefix_caching
        config = RocoConfig.from_additional_config(engine_args.additional_config)
        config.check_block_size(BLOCK_SIZE)
        if run.variant.policy is None:
            assert engine_args.additional_config == {}
        else:
            assert config.budget == run.workload.budget


@pytest.mark.parametrize("name", WORKLOADS)
def test_model_holds_the_requests(name: str) -> None:
    for run in runs(name):
        config = json.loads((MODELS / run.workload.model / "config.json").read_text())
        assert run.requests.max_model_len <= config["max_position_embeddings"]


def test_every_row_has_a_key_of_its_own() -> None:
    every = [
        tuple(run.columns.values())
        for name in WORKLOADS
        for run in runs(name, variants=list(VARIANTS))
    ]
    assert len(set(every)) == len(every)


def test_prefill() -> None:
    for case in prefill.cases(list(prefill.CHUNKS)):
        command = engine(
            model=prefill.MODEL,
            batches=[prefill.SHORT, prefill.LONG],
            backend=case.backend,
            roco_options=case.roco_options,
        )
        arguments = parsed(latency, [*command, *latency_command(case.requests)])
        assert arguments.output_len == 1
        config = RocoConfig.from_additional_config(arguments.additional_config)
        config.check_block_size(BLOCK_SIZE)


def test_engine_arguments_come_last() -> None:
    options = Options(tokenizer=str(MODELS), engine_arguments=["--max-num-seqs=7"])
    arguments = parsed(throughput, engine(options=options))
    assert arguments.max_num_seqs == 7
