# SPDX-License-Identifier: Apache-2.0
"""A tiny model, as Hugging Face runs it and as the oracle does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.quality.oracle import Oracle
from tests.quality.tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny-llama")


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> PreTrainedModel:
    return save_tiny_model(tiny_folder)


@pytest.fixture(scope="session")
def tiny_oracle(tiny_folder: Path, tiny_model: PreTrainedModel) -> Oracle:
    return Oracle(str(tiny_folder), "cpu", torch.float32)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices only lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
