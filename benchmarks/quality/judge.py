# SPDX-License-Identifier: Apache-2.0
"""How the model with its full cache judges a text that was written under eviction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks.quality.results import Metrics

_BATCH = 8


@torch.inference_mode()
def judge(
    model: str, prompts: Sequence[list[int]], written: Sequence[list[int]]
) -> Metrics:
    """Compare every token with what the full cache expects in its place.

    Args:
        model: Hugging Face folder.
        prompts: Token ids, all equally many.
        written: What followed them, all equally many.

    Returns:
        For each text: `agreement`, the share of tokens that the full cache would have
        chosen after the same text; `divergence`, the number of tokens before the first
        that it would not have; `perplexity`, the mean loss in nats.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    network.to(device)
    first = len(prompts[0])
    metrics: dict[str, list[float]] = {
        "agreement": [],
        "divergence": [],
        "perplexity": [],
    }
    for start in range(0, len(prompts), _BATCH):
        texts = [
            prompt + text
            for prompt, text in zip(
                prompts[start : start + _BATCH],
                written[start : start + _BATCH],
                strict=True,
            )
        ]
        tokens = torch.tensor(texts, device=device)
        logits = network(tokens).logits[:, first - 1 : -1].float()
        targets = tokens[:, first:]
        loss = F.cross_entropy(logits.mT, targets, reduction="none").mean(-1)
        agrees = logits.argmax(-1) == targets
        # a running product is 1 up to the first that differs
        metrics["divergence"] += agrees.cumprod(-1).sum(-1).tolist()
        metrics["agreement"] += agrees.float().mean(-1).tolist()
        metrics["perplexity"] += loss.tolist()
    return metrics
