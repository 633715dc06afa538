# SPDX-License-Identifier: Apache-2.0
"""Measure cells with the oracle: the methods that the plugin is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import AutoTokenizer

from benchmarks.quality.cells import PERPLEXITY, PERPLEXITY_GENERATION, Cell, Setup
from benchmarks.quality.oracle import Keep, Oracle
from benchmarks.quality.outcomes import Metrics
from benchmarks.quality.tasks import build, prose


def keep_of(setup: Setup) -> Keep:
    """Return a setup in the oracle's words."""
    return Keep(
        setup.policy, budget=setup.budget, stride=setup.stride, chunk=setup.chunk
    )


def measure(model: str, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Metrics]]:
    """Yield what comes of cells, each with a setup of its own.

    Args:
        model: Hugging Face folder.
        cells: In this order.
    """
    # kernels for bfloat16 are slow on CPUs
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.bfloat16
    oracle = Oracle(model, device, dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for cell in cells:
        keep = keep_of(cell.setup)
        if cell.task in (PERPLEXITY, PERPLEXITY_GENERATION):
            passages = prose(tokenizer, cell.context, cell.n, cell.seed)
            losses = oracle.losses(passages, keep, cell.context // 2, "prompt")
            means = [sum(passage) / len(passage) for passage in losses]
            yield cell, {"perplexity": means}
        else:
            problems = build(cell.task, tokenizer, cell.context, cell.n, cell.seed)
            answers = oracle.generate(
                [problem.token_ids for problem in problems],
                keep,
                problems[0].max_tokens,
            )
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            scores = [
                problem.score(text)
                for problem, text in zip(problems, texts, strict=True)
            ]
            yield cell, {"accuracy": scores}
