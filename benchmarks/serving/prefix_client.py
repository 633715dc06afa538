# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's own client ask a server for texts that share prefixes, all at once."""

from __future__ import annotations

from vllm.benchmarks import serve

from benchmarks.serving.engines import MODELS
from benchmarks.serving.prefix_workloads import PrefixWorkload
from benchmarks.serving.vllm_bench import answered


def ask(
    url: str, workload: PrefixWorkload, seed: int, tokenizer: str
) -> dict[str, float]:
    """Return what `vllm bench serve` finds.

    Args:
        url: The server's address.
        workload: What it is asked for, whose text the client makes up.
        seed: Another one makes other text.
        tokenizer: Of the client.

    Raises:
        RuntimeError: Not every request is answered.
    """
    count = workload.num_requests
    command = [
        *(f"--base-url={url}", f"--model={MODELS / workload.model}"),
        *(f"--tokenizer={tokenizer}", f"--seed={seed}", "--ignore-eos"),
        *("--dataset-name=prefix_repetition", f"--num-prompts={count}"),
        *("--disable-tqdm", "--percentile-metrics=ttft", "--metric-percentiles=99"),
    ]
    for name in ("num_prefixes", "prefix_len", "suffix_len", "output_len"):
        option = f"--prefix-repetition-{name.replace('_', '-')}"
        command.append(f"{option}={getattr(workload, name)}")
    return answered(serve, command, count)
