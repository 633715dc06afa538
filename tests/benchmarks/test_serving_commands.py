# SPDX-License-Identifier: Apache-2.0
"""vLLM understands what the serving benchmarks tell it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm.benchmarks import latency, throughput
from vllm.engine.arg_utils import EngineArgs

from benchmarks.serving import prefill
from benchmarks.serving.engines import MODELS
from benchmarks.serving.vllm_bench import (
    latency_command,
    parsed,
    throughput_command,
)
from benchmarks.serving.workloads import CHUNKS, VARIANTS, WORKLOADS, runs
from vllm_roco.config import RocoConfig

BLOCK_SIZE = 16


TOKENIZER = f"--tokenizer={MODELS}"


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload(name: str) -> None:
    workload = WORKLOADS[name]
    for run in runs(name):
        command = run.engine.command([TOKENIZER])
        if workload.one_at_a_time:
            arguments = parsed(latency, [*command, *latency_command(run.requests)])
        else:
            requests = throughput_command(run.requests)
            arguments = parsed(throughput, [*command, *requests])
        engine_args = EngineArgs.from_cli_args(arguments)
        assert (Path(engine_args.model) / "config.json").exists()
        assert engine_args.kv_cache_memory_bytes == workload.kv_cache_bytes
        assert not engine_args.disable_log_stats
        assert not engine_args.enable_prefix_caching
        config = RocoConfig.from_additional_config(engine_args.additional_config)
        config.check_block_size(BLOCK_SIZE)
        if run.engine.roco is None:
            assert engine_args.additional_config == {}
        else:
            assert config == run.engine.roco
            assert config.budget == workload.budget


@pytest.mark.parametrize("name", WORKLOADS)
def test_model_holds_the_requests(name: str) -> None:
    for run in runs(name):
        config = json.loads((MODELS / run.engine.model / "config.json").read_text())
        assert run.requests.max_model_len <= config["max_position_embeddings"]


def test_every_row_has_a_key_of_its_own() -> None:
    every = [
        tuple(run.columns.values())
        for name in WORKLOADS
        for run in runs(name, variants=list(VARIANTS))
    ]
    assert len(set(every)) == len(every)


def test_prefill() -> None:
    for run in prefill.runs(CHUNKS):
        command = [*run.engine.command([TOKENIZER]), *latency_command(run.requests)]
        arguments = parsed(latency, command)
        assert arguments.output_len == 1
        config = RocoConfig.from_additional_config(arguments.additional_config)
        config.check_block_size(BLOCK_SIZE)


def test_an_engine_is_told_what_its_side_is_named_for() -> None:
    """A side whose option is not told measures another side once more."""
    told = {
        variant: json.loads(command.split("=", 1)[1]).get("roco", {})
        for variant in ("roco", "roco-apart")
        for run in runs("70b-two-gpus", variants=[variant])
        for command in run.engine.command([])
        if command.startswith("--additional-config=")
    }
    assert told["roco-apart"] == {**told["roco"], "agree": False}


def test_engine_arguments_come_last() -> None:
    command = runs("smoke")[0].engine.command([TOKENIZER, "--max-num-seqs=7"])
    assert parsed(throughput, command).max_num_seqs == 7
