# SPDX-License-Identifier: Apache-2.0
"""What steps take is part of vLLM's memory plan."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.configs import SHAPE
from tests.engine.tiny_models import SMALL_BUDGET, VOCABULARY, random_prompt
from tests.gpu.engines import FULL_GRAPHS, gpu_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

MIB = 2**20
# a counter, and the addresses of caches
BUILDER_BYTES = MIB // 16
# vLLM asks the driver, from which PyTorch takes its memory in pieces
PLAN_BYTES = 32 * MIB
# steps that take some 80 MiB
OPTIONS = replace(SMALL_BUDGET, budget=32768, stride=4096, chunk=1024)
ARGUMENTS: dict[str, Any] = dict(
    load_format="dummy",
    max_model_len=65536,
    max_num_seqs=1024,
    max_num_batched_tokens=16384,
    num_gpu_blocks_override=16384,
    # profile memory rather than be told
    kv_cache_memory_bytes=None,
    compilation_config={
        **FULL_GRAPHS["compilation_config"],
        "cudagraph_capture_sizes": [1, 8],
    },
)


@dataclass
class Start:
    """How an engine started.

    Attributes:
        available: Bytes that vLLM found available for the KV cache.
        built: Bytes that each metadata builder allocated.
        rehearsed: Bytes that a layer made and gave back while vLLM profiled.
        attended: The most that it did so in a step.
    """

    available: int = 0
    built: list[int] = field(default_factory=list)
    rehearsed: int = 0
    attended: int = 0


def start(
    model: Path,
    *,
    reserves: bool,
    prompt: Sequence[int] = (1, 2, 3),
    **arguments: Any,
) -> Start:
    """Start an engine and generate a little.

    Args:
        model: A Hugging Face folder.
        reserves: Whether the layers take the memory of steps while vLLM profiles.
        prompt: What is generated from.
        **arguments: Of `LLM`.
    """
    # not at the top: a machine without a GPU collects these tests too
    from vllm.v1.worker.gpu_worker import Worker

    from vllm_roco.attention.cuda import impl
    from vllm_roco.attention.cuda.impl import RocoCudaImpl
    from vllm_roco.attention.cuda.metadata import RocoCudaMetadataBuilder

    # of a process's first products, else counted for one engine and not for another
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    torch.cuda.empty_cache()
    result = Start()
    determine = Worker.determine_available_memory
    make = RocoCudaMetadataBuilder.__init__
    attend = RocoCudaImpl.forward

    def determining(worker: Worker) -> int:
        result.available = determine(worker)
        return result.available

    def making(*args: Any, **kwargs: Any) -> None:
        before = torch.cuda.memory_allocated()
        make(*args, **kwargs)
        result.built.append(torch.cuda.memory_allocated() - before)

    def attending(layer_impl: RocoCudaImpl, *args: Any, **kwargs: Any) -> torch.Tensor:
        if layer_impl.memory is None:
            # what the first of all layers takes now stays
            return attend(layer_impl, *args, **kwargs)
        torch.cuda.reset_peak_memory_stats()
        # PyTorch may give more, where it has a larger piece of memory at hand
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        output = attend(layer_impl, *args, **kwargs)
        taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        metadata = kwargs.get("attn_metadata", args[5] if len(args) > 5 else None)
        if metadata is None:
            result.rehearsed = max(result.rehearsed, taken)
        else:
            result.attended = max(result.attended, taken)
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "determine_available_memory", determining)
        patch.setattr(RocoCudaMetadataBuilder, "__init__", making)
        patch.setattr(RocoCudaImpl, "forward", attending)
        if not reserves:
            patch.setattr(impl, "reserve", lambda *args: None)
        with gpu_engine(model, OPTIONS, **{**ARGUMENTS, **arguments}) as engine:
            engine.generate([prompt], 4)
    # what is left of it must not count as free memory of the next one
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    return result


def test_builders_allocate_nothing_that_vllm_has_not_planned(tmp_path: Path) -> None:
    """They allocated it after vLLM had given the memory to the KV cache."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    # what a process loads once, it has loaded then
    start(tmp_path, reserves=False)
    without = start(tmp_path, reserves=False)
    reserved = start(tmp_path, reserves=True)
    needed = without.built[-1]
    print(
        f"steps take {needed / MIB:.1f} MiB; available to the KV cache: "
        f"{without.available / MIB:.1f} MiB if builders allocate that, "
        f"{reserved.available / MIB:.1f} MiB if vLLM sees it; builders then allocate "
        f"{max(reserved.built)} bytes"
    )
    assert needed > 2 * PLAN_BYTES
    # for a throw-away cache, and for the real one
    assert len(reserved.built) >= 2
    assert max(reserved.built) <= BUILDER_BYTES
    planned = without.available - reserved.available
    assert abs(planned - needed) <= PLAN_BYTES


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype", "of_a_number"),
    [("bfloat16", "auto", 0), ("bfloat16", "fp8", 1), ("float16", "fp8", 3)],
)
def test_prompts_take_nothing_that_vllm_has_not_planned(
    dtype: str, kv_cache_dtype: str, of_a_number: int, tmp_path: Path
) -> None:
    """FlashAttention's queries of an fp8 cache, and its output, were not in the plan.

    The bytes that each number of a query takes are those of FlashAttention 3.
    """
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs FlashAttention 3, which is for Hopper")
    heads, head_size, num_tokens = 64, 64, 15_000
    shape = SHAPE | {
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_size,
        "vocab_size": VOCABULARY,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    started = start(
        tmp_path,
        reserves=True,
        prompt=random_prompt(num_tokens, seed=0),
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
    )
    planned_tokens = ARGUMENTS["max_num_batched_tokens"]
    for taken, tokens in (
        (started.rehearsed, planned_tokens),
        (started.attended, num_tokens),
    ):
        expected = tokens * heads * (head_size * of_a_number + 4)
        assert expected <= taken <= expected + BUILDER_BYTES
    assert started.attended <= started.rehearsed
    assert max(started.built) <= BUILDER_BYTES
