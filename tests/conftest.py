# SPDX-License-Identifier: Apache-2.0
"""What every test shares: the environment vLLM sees, the model, the engine lock."""

from __future__ import annotations

import functools
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

# vLLM and the hub's client read these when they are imported
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from hypothesis import settings  # noqa: E402

from tools.smollm2 import smollm2_path  # noqa: E402

# a busy machine makes deadlines fail; `--hypothesis-profile=thorough` looks for more
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile("steady")

ENGINE_LOCK = FileLock(Path(tempfile.gettempdir()) / "vllm_roco_engine.lock")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the missing thing as the reason."""
    missing = _missing_for_gpu()
    if missing is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=missing))


def _missing_for_gpu() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return "needs an NVIDIA GPU: no nvidia-smi on PATH"
    if torch.version.cuda is None:
        return f"needs a CUDA build of torch: {torch.__version__} is not one"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU: torch.cuda.is_available() is False"
    return None


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, bfloat16."""
    return smollm2_path()


@pytest.fixture(scope="module")
def engine_lock() -> Iterator[None]:
    """Held while the module's engines live: two of them share cores and starve."""
    with ENGINE_LOCK:
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Wait for the engine lock before the test's time limit starts to run."""
    if "engine_lock" not in getattr(item, "fixturenames", ()):
        return (yield)
    with ENGINE_LOCK:
        return (yield)


@pytest.fixture(autouse=True)
def poisoned_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fill what torch leaves uninitialised with NaN, or with the largest integer.

    A result that depends on it shows at once, not only when memory is not zero by
    chance. Not for engines: what vLLM does with its buffers is its own affair.
    """
    if "engine" in request.keywords:
        return
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            poison = math.nan
        elif tensor.dtype == torch.bool:
            return tensor
        else:
            poison = torch.iinfo(tensor.dtype).max
        with torch.no_grad():
            return tensor.fill_(poison)

    return allocate_poisoned
