# SPDX-License-Identifier: Apache-2.0
"""A model that RoCo serves, and engines whose errors can be caught."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import envs

from tests.model_configs import save_config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that RoCo serves."""
    folder = tmp_path_factory.mktemp("llama")
    return save_config(folder, "llama", "LlamaForCausalLM")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine in this process, so that its errors arrive here."""
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    yield
    envs.disable_envs_cache()
