# SPDX-License-Identifier: Apache-2.0
"""A soak needs nothing but the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from tests.soak.mix import FIRST_TOKEN
from tests.soak.setups import save_small_model
from tests.soak.tokenizer import save_tokenizer


@pytest.mark.parametrize("windows", [False, True])
def test_a_model_without_any_other_model(windows: bool, tmp_path: Path) -> None:
    """On a host without a network no soak began."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    folder = save_small_model(tokenizer, tmp_path / "model", windows=windows)
    loaded = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert config.vocab_size == len(loaded) > 2 * FIRST_TOKEN
    assert config.eos_token_id == loaded.eos_token_id
    assert loaded.decode(loaded.encode("red green [a-f] é")) == "red green [a-f] é"


def test_whatever_the_pages_say_prompts_end_in_whole_characters(
    tmp_path: Path,
) -> None:
    """A word of theirs moved the first token of prompts to half of an arrow."""
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "tokenizer"))
    texts = tokenizer.batch_decode([[n] for n in range(FIRST_TOKEN, len(tokenizer))])
    assert all(text.isascii() for text in texts)


def test_text_behind_the_first_token_is_the_answer_alone(tmp_path: Path) -> None:
    """Behind a prompt that ends in mid-character vLLM returns both."""
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "tokenizer"))
    request = EngineCoreRequest(
        *("0", [FIRST_TOKEN + 1, FIRST_TOKEN], None, SamplingParams(), None, 0.0),
        *(None, None, None),
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    detokenizer.update(tokenizer.encode("green"), False)
    assert detokenizer.output_text == "green"
