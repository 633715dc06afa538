# SPDX-License-Identifier: Apache-2.0
"""Serves requests that share prefixes, by stock vLLM and by RoCo; fills `prefixes.csv`.

Time to first token is what vLLM's own metrics count, waiting included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
from vllm.benchmarks import throughput
from vllm.engine.arg_utils import EngineArgs

from benchmarks.rows import Table
from benchmarks.serving import prefix_client
from benchmarks.serving.counters import cached_and_preempted, read
from benchmarks.serving.http_server import running
from benchmarks.serving.jobs import Job
from benchmarks.serving.prefix_workloads import PrefixRun, PrefixWorkload, text
from benchmarks.serving.vllm_bench import parsed

TABLE = Table(
    "prefixes",
    key=(
        *("workload", "side", "warm", "round", "model", "gpu_memory_utilization"),
        *("kv_cache_bytes", "backend", "shield", "budget", "stride", "chunk"),
        *("prefix_hits", "answers", "num_requests", "num_prefixes", "num_turns"),
        *("prefix_len", "suffix_len", "output_len", "max_tokens"),
    ),
    results=("output_tok_s", "ttft_ms", "ttft_p99_ms", "hit_rate", "preemptions"),
)
READS = 2
"""How often a prefix is read before the clock starts.

Where prompts part shows with the second.
"""
WARM_UP_REQUESTS, WARM_UP_OUTPUT = 4, 32
_STOP = 7


def jobs(
    runs: Sequence[PrefixRun], tokenizer: str, arguments: Sequence[str]
) -> list[Job]:
    """Return the runs as measurements, those next to each other sharing an engine."""
    return [
        [(run.columns, partial(measure, run, tokenizer, arguments)) for run in group]
        for _, group in groupby(
            runs, key=lambda run: (run.number, run.engine, run.workload.over_http)
        )
    ]


def measure(
    run: PrefixRun, tokenizer: str, arguments: Sequence[str]
) -> dict[str, object]:
    """Serve a run's requests; return the columns of `prefixes.csv` that it fills.

    Raises:
        RuntimeError: The server does not start, the cache cannot be emptied, or an
            answer is missing or has another length.
    """
    workload = run.workload
    told = run.engine.command([f"--tokenizer={tokenizer}", *arguments])
    if workload.over_http:
        with running(told) as server:
            prefix_client.ask(server.url, warm_up(workload), 0, tokenizer)
            before = server.metrics()
            result = prefix_client.ask(server.url, workload, run.number, tokenizer)
            after = server.metrics()
        return {
            "output_tok_s": round(result["output_throughput"], 1),
            "ttft_ms": round(float(result["mean_ttft_ms"]), 2),
            "ttft_p99_ms": round(float(result["p99_ttft_ms"]), 2),
            **cached_and_preempted(before, after),
        }
    command = [*told, "--skip-tokenizer-init"]
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parsed(throughput, command)))
    requests = text(workload, run.number)
    # compiles kernels, with other text
    small = warm_up(workload)
    _serve(llm, small, text(small, run.number, 1))
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache cannot be emptied")
    if run.warm:
        prefixes = requests[0][: workload.num_prefixes]
        once = replace(warm_up(workload), num_requests=len(prefixes), output_len=1)
        for number in range(READS):
            _, suffixes = text(once, run.number, 2 + number)
            _serve(llm, once, (prefixes, suffixes))
    before, start = read(), time.perf_counter()
    answers = _serve(llm, workload, requests)
    seconds, after = time.perf_counter() - start, read()
    written = {len(answer.outputs[0].token_ids) for answer in answers}
    if written != {workload.output_len}:
        raise RuntimeError(f"answers have {written} tokens, not {workload.output_len}")
    # vLLM's protocol leaves their type open
    metrics = [vars(answer.metrics) for answer in answers]
    ttft_ms = [1e3 * found["first_token_latency"] for found in metrics]
    return {
        "output_tok_s": round(len(answers) * workload.output_len / seconds, 1),
        "ttft_ms": round(float(np.mean(ttft_ms)), 2),
        "ttft_p99_ms": round(float(np.percentile(ttft_ms, 99)), 2),
        **cached_and_preempted(before, after),
    }


def warm_up(workload: PrefixWorkload) -> PrefixWorkload:
    """Return a few requests like a workload's behind one prefix, that write little."""
    return replace(
        workload,
        num_requests=min(workload.num_requests, WARM_UP_REQUESTS),
        num_prefixes=1,
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
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            sampling(workload),
            use_tqdm=False,
        )
        served += answers
        known = [
            [*prompt, *answer.outputs[0].token_ids]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    return served
