# SPDX-License-Identifier: Apache-2.0
"""Measure cells with vLLM: the plugin as it is served, and the full cache beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt

from benchmarks.quality.cells import GENERATION, Cell, Setup

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


class Engine:
    """An engine of vLLM for cells that share a setup."""

    def __init__(self, model: str, cells: Sequence[Cell]) -> None:
        longest = max(cell.context for cell in cells)
        self._llm = LLM(model, **engine_arguments(cells[0].setup, longest))

    def answers(
        self, cell: Cell, prompts: Sequence[list[int]], max_tokens: int
    ) -> list[list[int]]:
        """Return the greedy continuation of every prompt."""
        # a long text is to become long, whatever the model thinks
        ignore_eos = cell.task == GENERATION
        outputs = self._complete(prompts, max_tokens=max_tokens, ignore_eos=ignore_eos)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def losses(
        self, cell: Cell, texts: Sequence[list[int]], first: int
    ) -> list[list[float]]:
        """Return the nats of every token from the `first` on."""
        outputs = self._complete(texts, max_tokens=1, prompt_logprobs=0)
        losses = []
        for text, output in zip(texts, outputs, strict=True):
            # of a token and of none but it
            entries = zip(text, output.prompt_logprobs or (), strict=True)
            losses.append(
                [
                    -entry[token].logprob
                    for token, entry in list(entries)[first:]
                    if entry is not None
                ]
            )
        return losses

    def close(self) -> None:
        """End the engine, which may keep its process from ending."""
        self._llm.llm_engine.engine_core.shutdown()

    def _complete(
        self, prompts: Sequence[list[int]], **sampling: Any
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput] = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            SamplingParams(temperature=0, **sampling),
            use_tqdm=False,
        )
        return outputs
