# SPDX-License-Identifier: Apache-2.0
"""Nothing is compiled while requests are served: the first ones are as fast as others.

`tests/attention/cuda/test_warmup.py` has more kinds of models, without a GPU.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils import jit_monitor

from tests.compilations import forgotten_kernels, watched_compilations
from tests.engine.engines import Engine
from tests.engine.test_request_options import OWN, SERVER
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from tests.gpu.engines import FULL_GRAPHS, PIECEWISE_GRAPHS, gpu_engine
from vllm_roco.kv_cache.page import page_view

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

MIB = 2**20
START_UP_SECONDS = 5
"""What the warm-up may take where Triton has compiled the kernels before."""

RUNS: dict[str, dict[str, Any]] = {
    "graphs": dict(FULL_GRAPHS),
    "graphs-fp8": dict(FULL_GRAPHS, kv_cache_dtype="fp8"),
    # queries come out of compiled code, and kernels are launched one by one
    "compiled": dict(PIECEWISE_GRAPHS),
    "old-runner": dict(FULL_GRAPHS),
}
NUM_REQUESTS = 160
HEADER = random_prompt(300, seed=0)
LENGTHS = (1, 2, 3, 5, 17, 31, 32, 63, 64, 65, 127, 130, 257, 333, 511, 700, 1023)


@pytest.mark.parametrize("run", RUNS)
def test_serving_compiles_nothing(
    run: str, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mass kernel was compiled at the first prompt, and again behind decodes."""
    if run == "old-runner":
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    arguments: dict[str, Any] = dict(
        dtype="bfloat16",
        # mode `generation` keeps the longest prompt
        additional_config={"roco": {**SERVER, "max_budget": 2048}},
        async_scheduling=True,
        enable_prefix_caching=True,
        max_model_len=4096,
        max_num_seqs=48,
        max_num_batched_tokens=1024,
        num_gpu_blocks_override=1536,
    )
    with (
        forgotten_kernels(),
        watched_compilations() as compiled,
        gpu_engine(smollm2, SMALL_BUDGET, **{**arguments, **RUNS[run]}) as engine,
    ):
        num_prepared = len(compiled)
        assert jit_monitor.is_active()
        hit_tokens = serve(engine)
        num_freed_blocks = engine.manager.num_freed_blocks
        late = compiled[num_prepared:]
        print(f"{run}: {num_prepared} kernels compiled or loaded at start-up")
        for kernel, key in late:
            print(f"compiled while serving: {kernel}{key}")
        check_warm_up(engine)
    # else nothing was asked
    assert hit_tokens > 0
    assert num_freed_blocks > NUM_REQUESTS
    assert [kernel for kernel, _ in late if kernel.startswith("vllm_roco")] == []


def requests() -> Iterator[tuple[tuple[int, ...], SamplingParams]]:
    """Yield prompts of every kind of length, with options and without."""
    some = random.Random(0)
    for number in range(NUM_REQUESTS):
        prompt = random_prompt(some.choice(LENGTHS), seed=number)
        if number % 5 == 4:
            prompt = HEADER + prompt
        name = some.choice(list(OWN)) if number % 3 == 2 else "default"
        yield (
            prompt,
            SamplingParams(
                temperature=0,
                max_tokens=some.randint(1, 150),
                ignore_eos=True,
                detokenize=False,
                extra_args={f"roco_{key}": value for key, value in OWN[name].items()},
            ),
        )


def serve(engine: Engine) -> int:
    """Serve requests that come and go; return how many tokens were hit."""
    some = random.Random(1)
    llm = engine.llm.llm_engine
    waiting = list(enumerate(requests()))[::-1]
    hit_tokens: dict[str, int] = {}
    while waiting or llm.has_unfinished_requests():
        # one alone first, then few, then many
        for _ in range(some.choice((0, 0, 1, 2)) if hit_tokens else 1):
            if waiting:
                number, (prompt, sampling) = waiting.pop()
                given = {"prompt_token_ids": list(prompt)}
                llm.add_request(f"{number}", given, sampling)
        for output in llm.step():
            hit_tokens[output.request_id] = output.num_cached_tokens or 0
            if int(output.request_id) % 11 == 3 and some.random() < 0.1:
                llm.abort_request([output.request_id])
    assert len(hit_tokens) == NUM_REQUESTS
    return sum(hit_tokens.values())


def check_warm_up(engine: Engine) -> None:
    """It is fast where Triton has a cache, small, and leaves caches as they are."""
    # not at the top: a machine without a GPU collects these tests too
    from vllm_roco.attention.cuda.warmup import KERNEL_WARM_UP

    torch.cuda.synchronize()
    before = [page_view(cache).view(torch.uint8).clone() for cache in engine.kv_caches]
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with forgotten_kernels(), watched_compilations() as loaded:
        begun = time.perf_counter()
        KERNEL_WARM_UP.warmup(vllm_config=engine.core.vllm_config)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() - allocated
    print(
        f"the warm-up loads {len(loaded)} kernels in {seconds:.2f} s and takes "
        f"{peak / MIB:.2f} MiB meanwhile"
    )
    assert loaded
    assert seconds <= START_UP_SECONDS
    assert peak <= 4 * MIB
    assert torch.cuda.memory_allocated() == allocated
    for pages, cache in zip(before, engine.kv_caches, strict=True):
        assert torch.equal(pages, page_view(cache).view(torch.uint8))
