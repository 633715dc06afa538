# SPDX-License-Identifier: Apache-2.0
"""Measure cells with vLLM: the plugin as it is served, and the full cache beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer
from vllm import LLM, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt

from benchmarks.quality.cells import (
    GENERATION,
    PERPLEXITY,
    PERPLEXITY_GENERATION,
    PROMPT_OF_GENERATION,
    Cell,
    Setup,
)
from benchmarks.quality.judge import judge
from benchmarks.quality.outcomes import Metrics
from benchmarks.quality.tasks import build, prose

MOST_ANSWER_TOKENS = 128
MAX_NUM_SEQS = 128


def engine_arguments(setup: Setup, context: int) -> dict[str, Any]:
    """Return the arguments of `LLM` beside the model.

    Args:
        setup: How the cache is kept.
        context: Most tokens of a prompt.
    """
    arguments: dict[str, Any] = {
        "max_model_len": context + MOST_ANSWER_TOKENS,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        # compiling takes longer than any cell
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [8, 32, 64, MAX_NUM_SEQS],
        },
    }
    if torch.cuda.is_available():
        # several engines share the device
        arguments |= {"kv_cache_memory_bytes": 2 * 2**30, "gpu_memory_utilization": 0.1}
    if not setup.budget:
        return arguments
    options = {
        "policy": setup.policy,
        "budget": setup.budget,
        "stride": setup.stride,
        "chunk": setup.chunk,
    }
    if setup.shield:
        options |= {"shield": setup.shield, "shield_ratio": setup.shield_ratio}
    return arguments | {
        "attention_backend": "roco",
        "block_size": setup.block_size,
        "additional_config": {"roco": options},
    }


def measure(model: str, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Metrics]]:
    """Yield what comes of cells that share a setup.

    Args:
        model: Hugging Face folder.
        cells: In this order.
    """
    longest = max(cell.context for cell in cells)
    llm = LLM(model, **engine_arguments(cells[0].setup, longest))
    tokenizer = AutoTokenizer.from_pretrained(model)
    try:
        for cell in cells:
            if cell.task in (PERPLEXITY, PERPLEXITY_GENERATION):
                yield cell, _perplexity(llm, tokenizer, cell)
            elif cell.task == GENERATION:
                yield cell, _generation(llm, tokenizer, cell, model)
            else:
                yield cell, _accuracy(llm, tokenizer, cell)
    finally:
        # an engine in this process may keep it from ending
        llm.llm_engine.engine_core.shutdown()


def _accuracy(llm: LLM, tokenizer: Any, cell: Cell) -> Metrics:
    problems = build(cell.task, tokenizer, cell.context, cell.n, cell.seed)
    outputs = _complete(
        llm,
        [problem.token_ids for problem in problems],
        max_tokens=problems[0].max_tokens,
    )
    return {
        "accuracy": [
            problem.score(output.outputs[0].text)
            for problem, output in zip(problems, outputs, strict=True)
        ]
    }


def _perplexity(llm: LLM, tokenizer: Any, cell: Cell) -> Metrics:
    passages = prose(tokenizer, cell.context, cell.n, cell.seed)
    outputs = _complete(llm, passages, max_tokens=1, prompt_logprobs=0)
    first = cell.context // 2
    losses = []
    for passage, output in zip(passages, outputs, strict=True):
        entries = output.prompt_logprobs or []
        # of a token and of none but it
        logprobs = [
            entry[token].logprob
            for token, entry in zip(passage[first:], entries[first:], strict=True)
            if entry is not None
        ]
        losses.append(-sum(logprobs) / len(logprobs))
    return {"perplexity": losses}


def _generation(llm: LLM, tokenizer: Any, cell: Cell, model: str) -> Metrics:
    prompts = prose(tokenizer, PROMPT_OF_GENERATION, cell.n, cell.seed)
    outputs = _complete(
        llm, prompts, max_tokens=cell.context - PROMPT_OF_GENERATION, ignore_eos=True
    )
    written = [list(output.outputs[0].token_ids) for output in outputs]
    return judge(model, prompts, written)


def _complete(
    llm: LLM, prompts: Sequence[list[int]], **sampling: Any
) -> list[RequestOutput]:
    outputs: list[RequestOutput] = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        SamplingParams(temperature=0, **sampling),
        use_tqdm=False,
    )
    return outputs
