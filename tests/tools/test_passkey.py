# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tools.passkey import FILLER, QUESTION, SECOND_QUESTION, build_passkey


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.parametrize("num_tokens", [128, 1000, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_prompt_fills_its_length(tokenizer: Any, num_tokens: int, depth: float) -> None:
    prompt = build_passkey(tokenizer, num_tokens=num_tokens, depth=depth, seed=3)

    filler = len(tokenizer(f"{FILLER}\n")["input_ids"])
    assert num_tokens - filler < len(prompt.token_ids) <= num_tokens
    assert tokenizer(prompt.text)["input_ids"] == prompt.token_ids


def test_needle_lies_at_its_depth(tokenizer: Any) -> None:
    starts = []
    for depth in (0.0, 0.5, 1.0):
        prompt = build_passkey(tokenizer, num_tokens=2048, depth=depth, seed=3)
        ids = [prompt.token_ids[position] for position in prompt.needle]
        assert tokenizer.decode(ids) == (
            f"The pass key is {prompt.key}. Remember it. {prompt.key} is the pass key."
        )
        starts.append(prompt.needle.start / len(prompt.token_ids))

    assert starts == pytest.approx([0.0, 0.5, 1.0], abs=0.03)


def test_seed_chooses_the_key(tokenizer: Any) -> None:
    keys = [
        build_passkey(tokenizer, num_tokens=200, depth=0.5, seed=seed).key
        for seed in (0, 0, 1)
    ]

    assert keys[0] == keys[1] != keys[2]


def test_answer_is_the_key_at_the_start(tokenizer: Any) -> None:
    prompt = build_passkey(tokenizer, num_tokens=200, depth=0.5, seed=0)

    assert prompt.is_answered_by(f" {prompt.key}. Remember")
    assert not prompt.is_answered_by(f" not {prompt.key}")


def test_asked_again_differs_in_the_question_alone(tokenizer: Any) -> None:
    first = build_passkey(tokenizer, num_tokens=1000, depth=0.5, seed=0)

    second = first.asked_again(tokenizer)

    assert second.text.endswith(f"\n{FILLER}\n{SECOND_QUESTION}")
    assert second.token_ids == tokenizer(second.text)["input_ids"]
    pairs = enumerate(zip(first.token_ids, second.token_ids, strict=False))
    alike = next(position for position, (one, other) in pairs if one != other)
    assert tokenizer.decode(first.token_ids[alike:]) == QUESTION
    assert (second.key, second.needle) == (first.key, first.needle)


def test_too_short_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"num_tokens = 20 .* Raise num_tokens"):
        build_passkey(tokenizer, num_tokens=20, depth=0.5, seed=0)


@pytest.mark.parametrize("depth", [-0.1, 1.5])
def test_depth_out_of_range_is_refused(tokenizer: Any, depth: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        build_passkey(tokenizer, num_tokens=200, depth=depth, seed=0)
