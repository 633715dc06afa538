# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's own client ask a server at a rate: Poisson arrivals, real HTTP.

The prompts are a trace, whose token ids the client makes up: lengths are exact, what is
shared is, and nobody has to encode 16K tokens of random text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from vllm.benchmarks import serve

from benchmarks.serving.engines import MODELS
from benchmarks.serving.online_shapes import AT_ONCE, Shape
from benchmarks.serving.vllm_bench import answered

PERCENTILES = (50, 90, 99, 100)
WARM_UP_REQUESTS, WARM_UP_OUTPUT = 4, 32
READS = 2
"""How often each prefix is read before: where prompts part shows with the second."""
_CHUNK = 4096
_SHARED, _OWN = 2**16, 2**48
"""Numbers of texts: those below the first are shared, the others drawn up to this."""


def trace(shape: Shape, seed: int) -> Iterator[dict[str, object]]:
    """Yield the requests as vLLM's `timed_trace` reads them.

    Args:
        shape: Which and how many.
        seed: Another one draws other lengths, prefixes and texts.
    """
    random = np.random.default_rng(seed)
    every = range(shape.num_requests)
    # spread evenly: every share of the requests has as many of them
    fresh = np.floor(np.multiply(every, shape.fresh_share) + 0.5)
    is_fresh = np.diff(fresh, prepend=0) > 0
    for number in every:
        own, written = (
            _length(random, mean, shape.spread)
            for mean in (shape.input_len, shape.output_len)
        )
        chunk = chunk_size(shape)
        length = shape.prefix_len + own
        texts = random.integers(_SHARED, _OWN, -(-length // chunk)).tolist()
        if shape.num_prefixes and not is_fresh[number]:
            texts[0] = int(random.integers(shape.num_prefixes))
        yield {
            **{"timestamp": 0, "input_length": length, "output_length": written},
            "hash_ids": texts,
        }


def chunk_size(shape: Shape) -> int:
    """Return how many tokens a number of a trace's `hash_ids` stands for."""
    return shape.prefix_len or _CHUNK


def warm_up(shape: Shape) -> Iterator[dict[str, object]]:
    """Yield a few requests that compile kernels and read the prefixes."""
    few = replace(shape, num_requests=WARM_UP_REQUESTS, num_prefixes=0)
    for request in trace(few, seed=0):
        yield {**request, "output_length": min(WARM_UP_OUTPUT, shape.output_len)}
    for number in range(READS * shape.num_prefixes):
        prefix = number % shape.num_prefixes
        yield {
            **{"timestamp": 0, "input_length": shape.prefix_len + 1 + number},
            **{"output_length": 1, "hash_ids": [prefix, _SHARED + number]},
        }


def warmed_up(url: str, shape: Shape, tokenizer: str) -> None:
    """Let a server answer what `warm_up` yields, one after another."""
    _ask(url, shape, list(warm_up(shape)), AT_ONCE, tokenizer, "--max-concurrency=1")


def ask(
    url: str, shape: Shape, rate: float, seed: int, tokenizer: str
) -> dict[str, float]:
    """Return what `vllm bench serve` finds.

    Args:
        url: The server's address.
        shape: What it is asked for.
        rate: Requests a second.
        seed: Of the arrivals and of what `trace` draws.
        tokenizer: Of the client.

    Raises:
        RuntimeError: Not every request is answered.
    """
    requests = list(trace(shape, seed))
    return _ask(url, shape, requests, rate, tokenizer, f"--seed={seed}")


def _ask(
    url: str,
    shape: Shape,
    requests: list[dict[str, object]],
    rate: float,
    tokenizer: str,
    option: str,
) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        path.write_text("".join(json.dumps(request) + "\n" for request in requests))
        percentiles = ",".join(map(str, PERCENTILES))
        command = [
            *(f"--base-url={url}", f"--model={MODELS / shape.model}"),
            *(f"--tokenizer={tokenizer}", option),
            *("--dataset-name=timed_trace", f"--dataset-path={path}"),
            f"--timed-trace-chunk-hash-size={chunk_size(shape)}",
            *("--no-self-timed", f"--request-rate={rate}"),
            *(f"--num-prompts={len(requests)}", "--ready-check-timeout-sec=0"),
            *(
                "--percentile-metrics=ttft,tpot,itl",
                f"--metric-percentiles={percentiles}",
            ),
            # last: it takes all that follows
            *("--goodput", f"ttft:{shape.ttft_ms}", f"tpot:{shape.tpot_ms}"),
        ]
        return answered(serve, command, len(requests))


def _length(random: np.random.Generator, mean: int, spread: float) -> int:
    """Return a length in tokens: log-normal, from 1/8 to 4 times its mean."""
    if not spread:
        return mean
    drawn = random.lognormal(np.log(mean) - spread**2 / 2, spread)
    return int(np.clip(drawn, max(1, mean // 8), 4 * mean))
