# SPDX-License-Identifier: Apache-2.0
"""Models that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.engine.tiny_models import load_for_oracle, save_tiny_model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as a Hugging Face folder, float32."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_llama_for_oracle(tiny_llama: Path) -> PreTrainedModel:
    """The same, as the oracle wants it."""
    return load_for_oracle(tiny_llama)


@pytest.fixture(params=["smollm2", "gemma_3"])
def model(request: pytest.FixtureRequest) -> Path:
    """A real model; of the second one, most layers have a window and are vLLM's."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(autouse=True)
def no_flashinfer_sampler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Greedy sampling needs no kernel of FlashInfer, which compiles on first use."""
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    yield


@pytest.fixture(autouse=True, scope="package")
def exact_float32() -> Iterator[None]:
    """vLLM's kernels in Triton multiply float32 as TF32 unless told otherwise.

    A sum of such products depends on its tile, and the tile of experts on the step's
    size: in a crowd a request has other log-probabilities, with stock vLLM, too.
    For the whole package, because what a process has compiled stays.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_F32_DEFAULT", "ieee")
        yield
