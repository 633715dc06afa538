# SPDX-License-Identifier: Apache-2.0
"""Models and text that several modules need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.engine.tiny_models import load_for_oracle, save_tiny_model
from vllm_roco.cpu_platform import RocoCpuPlatform


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as a Hugging Face folder, float32."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_llama_for_oracle(tiny_llama: Path) -> PreTrainedModel:
    """The same, as the oracle wants it."""
    return load_for_oracle(tiny_llama)


@pytest.fixture(scope="session")
def prose() -> str:
    """Some 450 tokens of free text, written for these tests."""
    return Path(__file__).with_name("prose.txt").read_text(encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices only lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU platform have asynchronous scheduling."""
    check = RocoCpuPlatform.check_and_update_config

    def check_and_turn_on(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(
        RocoCpuPlatform, "check_and_update_config", staticmethod(check_and_turn_on)
    )
