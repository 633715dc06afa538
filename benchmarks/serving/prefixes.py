# SPDX-License-Identifier: Apache-2.0
"""Serves requests that share prefixes, by stock vLLM and by RoCo; fills `prefixes.csv`.

Time to first token is what vLLM's own metrics count, waiting included.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from vllm import LLM, RequestOutput, SamplingParams
from vllm.benchmarks import serve as bench_serve
from vllm.benchmarks import throughput
from vllm.engine.arg_utils import EngineArgs

from benchmarks.rows import Table
from benchmarks.serving.counters import HITS, PREEMPTIONS, QUERIES, read, summed
from benchmarks.serving.engines import MODELS, Options
from benchmarks.serving.jobs import Job
from benchmarks.serving.prefix_workloads import PrefixRun, PrefixWorkload, text
from benchmarks.serving.vllm_bench import parsed
from tools.demo import DemoError
from tools.demo.server import Server

TABLE = Table(
    "prefixes",
    key=(
        *("workload", "side", "warm", "round", "model", "gpu_memory_utilization"),
        *("kv_cache_bytes", "backend", "budget", "stride", "chunk", "num_requests"),
        *("num_prefixes", "num_turns", "prefix_len", "suffix_len", "output_len"),
        "max_tokens",
    ),
    results=("output_tok_s", "ttft_ms", "ttft_p99_ms", "hit_rate", "preemptions"),
)
READS = 2
"""How often a prefix is read before the clock starts.

Where prompts part shows with the second.
"""
WARM_UP_REQUESTS, WARM_UP_OUTPUT = 4, 32
_STOP = 7
_HOST = "127.0.0.1"


def jobs(runs: Sequence[PrefixRun], options: Options) -> list[Job]:
    """Return the runs as measurements, those next to each other sharing an engine."""

    def measure(run: PrefixRun) -> Mapping[str, object]:
        return (over_http if run.workload.over_http else in_process)(run, options)

    return [
        [(run.columns, partial(measure, run)) for run in group]
        for _, group in groupby(
            runs, key=lambda run: (run.number, run.engine, run.workload.over_http)
        )
    ]


def in_process(run: PrefixRun, options: Options) -> dict[str, object]:
    """Serve a run's requests; return the columns of `prefixes.csv` that it fills.

    Raises:
        RuntimeError: The cache cannot be emptied, or answers have another length.
    """
    workload = run.workload
    command = [*run.engine.command(options), "--skip-tokenizer-init"]
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parsed(throughput, command)))
    requests = text(workload, run.number)
    # compiles kernels, with other text
    small = warm_up(workload)
    _serve(llm, small, text(small, run.number, 1))
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache cannot be emptied")
    if run.warm:
        once = replace(
            small, num_requests=workload.num_prefixes, output_len=1, max_tokens=None
        )
        for number in range(READS):
            _, suffixes = text(once, run.number, 2 + number)
            _serve(llm, once, (requests[0][: once.num_requests], suffixes))
    before, start = read(), time.perf_counter()
    answers = _serve(llm, workload, requests)
    seconds, after = time.perf_counter() - start, read()
    written = {len(answer.outputs[0].token_ids) for answer in answers}
    if written != {workload.output_len}:
        raise RuntimeError(f"answers have {written} tokens, not {workload.output_len}")
    # vLLM's protocol leaves their type open
    metrics = [vars(answer.metrics) for answer in answers]
    ttft_ms = 1e3 * np.array([found["first_token_latency"] for found in metrics])
    return {
        "output_tok_s": round(len(answers) * workload.output_len / seconds, 1),
        "ttft_ms": round(float(ttft_ms.mean()), 2),
        "ttft_p99_ms": round(float(np.percentile(ttft_ms, 99)), 2),
        **_counted(before, after),
    }


def warm_up(workload: PrefixWorkload) -> PrefixWorkload:
    """Return a few of a workload's requests with a few tokens to write."""
    return replace(
        workload,
        num_requests=min(workload.num_requests, WARM_UP_REQUESTS),
        num_turns=1,
        output_len=min(workload.output_len, WARM_UP_OUTPUT),
    )


def sampling(workload: PrefixWorkload) -> SamplingParams:
    """Return how a client asks for so many tokens, in a way that an engine foresees.

    Or in one that it cannot: no token stops before, and then the stop token is drawn.
    """
    if workload.max_tokens is None:
        return SamplingParams(
            max_tokens=workload.output_len, ignore_eos=True, detokenize=False
        )
    return SamplingParams(
        max_tokens=workload.max_tokens,
        min_tokens=workload.output_len - 1,
        stop_token_ids=[_STOP],
        logit_bias={_STOP: 100},
        ignore_eos=True,
        detokenize=False,
    )


def _serve(
    llm: LLM,
    workload: PrefixWorkload,
    requests: tuple[list[list[int]], list[list[list[int]]]],
) -> list[RequestOutput]:
    """Serve what `text` returns, turn by turn; return every answer."""
    known, turns = requests
    served: list[RequestOutput] = []
    for suffixes in turns:
        prompts = [[*old, *new] for old, new in zip(known, suffixes, strict=True)]
        answers = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling(workload),
            use_tqdm=False,
        )
        served += answers
        known = [
            [*prompt, *answer.outputs[0].token_ids]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    return served


def over_http(run: PrefixRun, options: Options) -> dict[str, object]:
    """Start a server, let `vllm bench serve` ask it, and return the same columns.

    Raises:
        RuntimeError: The server does not start, or does not answer every request.
    """
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port = probe.getsockname()[1]
    url, model = f"http://{_HOST}:{port}", str(MODELS / run.engine.model)
    arguments = [
        argument
        for argument in run.engine.command(options)
        if argument not in (f"--model={model}", "--disable-detokenize")
    ]
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    command = [*vllm, model, f"--host={_HOST}", f"--port={port}", *arguments]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with Server(command, {"VLLM_NO_USAGE_STATS": "1"}, url, log) as server:
            try:
                server.wait_until_ready()
            except DemoError as error:
                end = log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{error}\n{end}") from error
            _ask(url, run.workload.num_prefixes, 1000 + run.number, run, options)
            before = _metrics(url)
            count = run.workload.num_requests
            result = _ask(url, count, run.number, run, options)
            after = _metrics(url)
    if result["completed"] != count:
        raise RuntimeError(f"{result['completed']} of {count} requests were answered")
    return {
        "output_tok_s": round(result["output_throughput"], 1),
        "ttft_ms": round(result["mean_ttft_ms"], 2),
        "ttft_p99_ms": round(result["p99_ttft_ms"], 2),
        **_counted(before, after),
    }


def _ask(
    url: str, count: int, seed: int, run: PrefixRun, options: Options
) -> dict[str, float]:
    """Return what `vllm bench serve` finds; another seed makes other text."""
    workload = run.workload
    command = [
        *(f"--base-url={url}", f"--model={MODELS / run.engine.model}"),
        *(f"--tokenizer={options.tokenizer}", f"--seed={seed}", "--ignore-eos"),
        *("--dataset-name=prefix_repetition", f"--num-prompts={count}"),
        *("--disable-tqdm", "--percentile-metrics=ttft", "--metric-percentiles=99"),
    ]
    for name in ("num_prefixes", "prefix_len", "suffix_len", "output_len"):
        option = f"--prefix-repetition-{name.replace('_', '-')}"
        command.append(f"{option}={getattr(workload, name)}")
    return dict(bench_serve.main(parsed(bench_serve, command)))


def _metrics(url: str) -> Mapping[str, float]:
    page = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    return summed(text_string_to_metric_families(page))


def _counted(
    before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, object]:
    """Return the columns that the engine's own counters fill."""
    queries, hits, preemptions = (
        after[name] - before[name] for name in (QUERIES, HITS, PREEMPTIONS)
    )
    return {
        "hit_rate": round(hits / queries, 4) if queries else None,
        "preemptions": round(preemptions),
    }
