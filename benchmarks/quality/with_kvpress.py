# SPDX-License-Identifier: Apache-2.0
"""Measure cells with kvpress, which sees a whole prompt before it compresses.

kvpress wants an older transformers than vLLM does, hence an environment of its own::

    pip install kvpress==0.5.5 filelock gguf pandas scipy tqdm
    python -m benchmarks.quality run --preset kvpress --out DIR

Memory is bounded only once the prompt has been read, and the first token of an answer
comes from the whole cache. Runs on a CPU, a few minutes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from typing_extensions import override

from benchmarks.quality import cells
from benchmarks.quality.cells import Cell, Job


class Engine(cells.Engine):
    """A model of transformers, which every press is applied to; it has no losses."""

    @override
    def __init__(self, model: str, cells: Job) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.float32,
            # the only one that hands out what ObservedAttention looks at
            attn_implementation="eager",
        )

    @override
    def answers(
        self,
        cell: Cell,
        prompts: Sequence[list[int]],
        max_tokens: int,
        *,
        to_the_end: bool = False,
    ) -> list[list[int]]:
        press = press_of(cell)
        return [answer(self._model, prompt, max_tokens, press) for prompt in prompts]


def press_of(cell: Cell) -> Any:
    """Return a press that keeps the cell's share of a prompt; None for all of it."""
    if cell.setup.policy == "full":
        return None
    import kvpress

    press = getattr(kvpress, f"{cell.setup.policy}Press")
    return press(compression_ratio=1 - cell.budget_ratio)


@torch.inference_mode()
def answer(model: Any, prompt: list[int], max_tokens: int, press: Any) -> list[int]:
    """Return the greedy continuation of a prompt that was read and then compressed."""
    cache = DynamicCache()
    tokens = torch.tensor([prompt])
    with press(model) if press else contextlib.nullcontext():
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    written = [int(logits[0, -1].argmax())]
    for position in range(len(prompt), len(prompt) + max_tokens - 1):
        # positions go on as if nothing had been dropped
        logits = model(
            torch.tensor([[written[-1]]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
        ).logits
        written.append(int(logits[0, -1].argmax()))
    return written
