# SPDX-License-Identifier: Apache-2.0
"""Measure cells with vLLM: the plugin as it is served, and the full cache beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import override
from vllm import LLM, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt

from benchmarks.quality import cells
from benchmarks.quality.cells import Cell, Job, Setup
from benchmarks.quality.pace import options as pace_options
from benchmarks.quality.tasks import tokens_behind

MOST_ANSWER_TOKENS = 128
MAX_NUM_SEQS = 128


def engine_arguments(setup: Setup, context: int) -> dict[str, Any]:
    """Return the arguments of `LLM` beside the model.

    Args:
        setup: How the cache is kept.
        context: Most tokens of a prompt, the last one of a conversation with it.
    """
    arguments: dict[str, Any] = {
        "max_model_len": context + MOST_ANSWER_TOKENS,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        "kv_cache_dtype": setup.kv_cache_dtype,
        # compiling takes longer than any cell
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [8, 32, 64, MAX_NUM_SEQS],
        },
    }
    if torch.cuda.is_available():
        # several engines share the device
        # all that is written by the full cache lives at once
        memory = (4 if setup.budget else 8) * 2**30
        arguments |= {"kv_cache_memory_bytes": memory, "gpu_memory_utilization": 0.1}
    if not setup.budget:
        return arguments
    names = ["policy", "stride", "chunk"]
    if setup.shield:
        names += ["shield", "shield_ratio"]
    asked = dict(setup.request)
    # a server is the same whichever of its cells comes first
    options = {name: getattr(setup, name) for name in names if name not in asked}
    if setup.request:
        # a prompt that is kept, and a budget of its size
        options |= {"max_budget": 2 * context, "allow_full": True}
    else:
        options["budget"] = setup.budget
    return arguments | {
        "attention_backend": "roco",
        "block_size": setup.block_size,
        "additional_config": {"roco": options},
    }


def asked_of(setup: Setup, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
    """Return the options that each request brings.

    Args:
        setup: How the cache is kept; a pace is chosen for each prompt.
        prompts: Token ids.
    """
    common = dict(setup.request)
    pace, memory = (common.pop(name, None) for name in ("pace", "memory"))
    every = [
        common if pace is None else common | pace_options(pace, memory, prompt)
        for prompt in prompts
    ]
    return [{f"roco_{name}": each[name] for name in each} for each in every]


class Engine(cells.Engine):
    """An engine of vLLM for cells that share a setup."""

    @override
    def __init__(self, model: str, cells: Job) -> None:
        longest = max(cell.context + tokens_behind(cell.task) for cell in cells)
        self._llm = LLM(model, **engine_arguments(cells[0].setup, longest))

    @override
    def answers(
        self,
        cell: Cell,
        prompts: Sequence[list[int]],
        max_tokens: int,
        *,
        to_the_end: bool = False,
    ) -> list[list[int]]:
        outputs = self._complete(
            prompts,
            asked_of(cell.setup, prompts),
            max_tokens=max_tokens,
            ignore_eos=to_the_end,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    @override
    def losses(
        self, cell: Cell, texts: Sequence[list[int]], first: int
    ) -> list[list[float]]:
        asked = asked_of(cell.setup, texts)
        outputs = self._complete(texts, asked, max_tokens=1, prompt_logprobs=0)
        return [
            [
                # of a token and of none but it; the first has none
                -(entry or {})[token].logprob
                for token, entry in zip(
                    text[first:], (output.prompt_logprobs or [])[first:], strict=True
                )
            ]
            for text, output in zip(texts, outputs, strict=True)
        ]

    @override
    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _complete(
        self,
        prompts: Sequence[list[int]],
        asked: Sequence[dict[str, Any]],
        **sampling: Any,
    ) -> list[RequestOutput]:
        return self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            [
                SamplingParams(temperature=0, extra_args=each or None, **sampling)
                for each in asked
            ],
            use_tqdm=False,
        )
