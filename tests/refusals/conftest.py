# SPDX-License-Identifier: Apache-2.0
"""A model that RoCo serves, and engines whose errors can be caught."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.engines import engines_in_process
from tests.model_configs import save_config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that RoCo serves."""
    folder = tmp_path_factory.mktemp("llama")
    return save_config(folder, "llama", "LlamaForCausalLM")


@pytest.fixture
def in_process() -> Iterator[None]:
    """The engine in this process, so that its errors arrive here."""
    with engines_in_process():
        yield
