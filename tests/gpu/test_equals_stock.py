# SPDX-License-Identifier: Apache-2.0
"""With a budget that nobody reaches, ROCO is one more stock backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.engine.engines import Engine, Prompt
from tests.gpu.engines import gpu_engine
from tests.oracle import Options
from tools.passkey import build_passkey

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

NUM_NEW = 96
NEVER = Options(
    policy="roco",
    shield="peak",
    shield_ratio=0.7,
    budget=4096,
    stride=128,
    chunk=512,
    sink=16,
    recent=32,
    block_size=16,
)
ARGUMENTS: dict[str, Any] = dict(
    max_model_len=2048,
    max_num_seqs=16,
    max_num_batched_tokens=2048,
    kv_cache_memory_bytes=2**31,
)


@dataclass(frozen=True)
class Answer:
    """A greedy continuation.

    Attributes:
        tokens: What was generated.
        gaps: Per token, by how much its log-probability exceeds the second's.
    """

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]


@dataclass(frozen=True)
class Disagreement:
    """How one run differs from another, prompt by prompt, up to where they part.

    Attributes:
        parted: Prompts whose tokens part at some place.
        widest_gap: The largest gap of the other run that was closed at such a place.
    """

    parted: int
    widest_gap: float

    @classmethod
    def between(cls, answers: list[Answer], others: list[Answer]) -> Disagreement:
        gaps = []
        for answer, other in zip(answers, others, strict=True):
            pairs = zip(answer.tokens, other.tokens, other.gaps, strict=True)
            gaps += next(([gap] for ours, its, gap in pairs if ours != its), [])
        return cls(len(gaps), max(gaps, default=0.0))


def answers(model: Path, options: Options | None, **arguments: Any) -> list[Answer]:
    """Return what a backend says to prompts of many lengths, all sent at once."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        build_passkey(tokenizer, num_tokens=length, depth=0.4, seed=length).token_ids
        for length in range(150, 1750, 100)
    ]
    with gpu_engine(model, options, **ARGUMENTS, **arguments) as engine:
        return answers_of(engine, prompts, NUM_NEW)


def answers_of(engine: Engine, prompts: Sequence[Prompt], num_new: int) -> list[Answer]:
    """Return what an engine says to prompts, all sent at once."""
    return [
        Answer(
            tuple(completion.token_ids),
            tuple(_gap(position) for position in completion.logprobs),
        )
        for completion in engine.complete(prompts, num_new, logprobs=2)
    ]


def _gap(position: dict[int, Any]) -> float:
    first, second = sorted((x.logprob for x in position.values()), reverse=True)[:2]
    return first - second


def test_bfloat16_differs_as_stock_backends_do(model: Path) -> None:
    flash, triton = (
        answers(model, None, dtype="bfloat16", attention_backend=name)
        for name in ("FLASH_ATTN", "TRITON_ATTN")
    )
    ours = answers(model, NEVER, dtype="bfloat16")
    between_stock = Disagreement.between(triton, flash)
    against_flash = Disagreement.between(ours, flash)
    # a handful of prompts: twice as many is what chance gives
    assert against_flash.parted <= 2 * between_stock.parted + 1
    assert against_flash.widest_gap <= 2 * between_stock.widest_gap + 0.05


def test_float32_equals_triton_attention(model: Path) -> None:
    triton = answers(model, None, dtype="float32", attention_backend="TRITON_ATTN")
    ours = answers(model, NEVER, dtype="float32")
    # float32 sums in another order close no gap that one can see
    assert Disagreement.between(ours, triton).widest_gap < 1e-3
