# SPDX-License-Identifier: Apache-2.0
"""vLLM with the plugin generates and keeps what the independent oracle does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedModel

from tests.engine.agreement import assert_agreement
from tests.engine.engines import running_engine
from tests.engine.kept_blocks import num_moved_blocks, recorded_kept_blocks
from tests.engine.tiny_models import TINY_BUDGET, load_for_oracle, random_prompt
from tests.oracle import Options, generate
from tools.passkey import build_passkey
from vllm_roco.metrics import get_metrics

pytestmark = pytest.mark.engine


def options(**changed: Any) -> Options:
    return replace(TINY_BUDGET, **changed)


RANDOM_MODEL = {
    "contribution": options(shield="contribution", shield_ratio=1),
    "contribution-blocks-of-32": options(
        shield="contribution", block_size=32, budget=128, stride=64, chunk=96
    ),
    "peak": options(),
    "deviation": options(shield="deviation", shield_ratio=0.3, budget=96, stride=16),
    "recent": options(policy="recent", stride=48),
    "h2o": options(policy="h2o"),
    "random": options(policy="random"),
    "mean-alone": options(shield_ratio=0),
    "shield-alone": options(shield_ratio=1, budget=80, sink=0, recent=0),
    "whole-prompt-in-one-step": options(chunk=256),
    "stride-above-budget": options(budget=48, stride=96),
    "peak-blocks-of-32": options(block_size=32, budget=128, stride=64, chunk=96),
    "deviation-blocks-of-32": options(
        shield="deviation", block_size=32, budget=96, chunk=32
    ),
    "recent-blocks-of-32": options(
        policy="recent", block_size=32, budget=96, stride=64, sink=40
    ),
}

SMOLLM2 = {
    "contribution": options(shield="contribution", shield_ratio=1),
    "peak": options(shield_ratio=0.7),
    "deviation-blocks-of-32": options(
        shield="deviation", shield_ratio=0.3, block_size=32, budget=96, chunk=128
    ),
    "recent": options(policy="recent", stride=16, chunk=96),
}


@pytest.mark.parametrize("name", RANDOM_MODEL)
def test_random_model(
    name: str, tiny_llama: Path, tiny_llama_for_oracle: PreTrainedModel
) -> None:
    """Prompts and generations around and above the budget, alone and together."""
    options = RANDOM_MODEL[name]
    prompts = [random_prompt(length, seed=length) for length in (230, 33, 129, 80)]
    # far enough for all of them, but the shortest where a stride is long, to evict
    num_new = options.budget + options.block_size + 2
    expected = [
        generate(tiny_llama_for_oracle, prompt, options, num_new) for prompt in prompts
    ]
    with running_engine(tiny_llama, options) as engine:
        assert get_metrics(engine.llm).moved_blocks == 0
        with recorded_kept_blocks(engine) as kept:
            alone = engine.generate_one_by_one(prompts, num_new)
        assert_agreement(prompts, alone, kept, expected)
        moved = num_moved_blocks(kept, options)
        assert get_metrics(engine.llm).moved_blocks == moved > 0
        with recorded_kept_blocks(engine) as kept:
            together = engine.generate(prompts, num_new)
        assert_agreement(prompts, together, kept, expected)
        metrics = get_metrics(engine.llm)
        assert metrics.moved_blocks == 2 * moved
        assert metrics.freed_blocks == engine.manager.num_freed_blocks
        assert metrics.max_sequence_kv_tokens == 0
        assert metrics.peak_sequence_kv_tokens > options.budget
        assert engine.num_lost_blocks == 0


@pytest.fixture(scope="module")
def smollm2_for_oracle(smollm2: Path) -> PreTrainedModel:
    return load_for_oracle(smollm2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOLLM2)
def test_smollm2(
    name: str, smollm2: Path, smollm2_for_oracle: PreTrainedModel, prose: str
) -> None:
    """A passkey prompt and free text, both longer than the budget.

    So is the answer with the product's default; with the others it is as long as takes
    one eviction and what follows it. Tokens of this model take their time.
    """
    options = SMOLLM2[name]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    key = build_passkey(tokenizer, num_tokens=300, depth=0.3, seed=7)
    prompts = [key.token_ids, tokenizer(prose)["input_ids"][:230]]
    num_new = options.stride + 6
    if name == "contribution":
        num_new = options.budget + 12
    expected = [
        generate(smollm2_for_oracle, prompt, options, num_new) for prompt in prompts
    ]
    with running_engine(smollm2, options) as engine:
        with recorded_kept_blocks(engine) as kept:
            together = engine.generate(prompts, num_new)
        assert engine.num_lost_blocks == 0
    assert_agreement(prompts, together, kept, expected)
    for prompt, result in zip(prompts, expected, strict=True):
        assert result.evictions[-1].num_computed_tokens > len(prompt)
