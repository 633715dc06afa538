# SPDX-License-Identifier: Apache-2.0
r"""What it costs that tensor-parallel ranks choose alike, on two GPUs.

    VLLM_ALLOW_INSECURE_SERIALIZATION=1 python -m benchmarks.serving.agreeing

A server is started with a model's shape and random weights, and its workers time the
end of a step in a CUDA graph, with what they tell each other and without. Nothing is
due in it, as in most steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from vllm import LLM
from vllm.distributed.parallel_state import get_tp_group, graph_capture

from benchmarks.serving.engines import MODELS
from vllm_roco.attention.cuda.eviction import CudaEviction
from vllm_roco.attention.cuda.step_buffers import StepBuffers
from vllm_roco.attention.layers import roco_layers
from vllm_roco.config import NAMESPACE

MODEL = "qwen2.5-7b"
OPTIONS = {"budget": 512, "stride": 128, "chunk": 512}
ROWS = (1, 16, 64, 128, 256)
CALLS = 20
"""Of a graph."""
REPLAYS = 25


def main() -> int:
    """Print microseconds a step, by its rows; return the exit status."""
    llm = LLM(
        str(MODELS / MODEL),
        load_format="dummy",
        tensor_parallel_size=2,
        skip_tokenizer_init=True,
        max_model_len=2304,
        max_num_seqs=max(ROWS),
        attention_backend="ROCO",
        additional_config={NAMESPACE: OPTIONS},
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    )
    for step, times in llm.collective_rpc(ends_of_steps)[0].items():
        print(step, times, flush=True)
    return 0


@torch.inference_mode()
def ends_of_steps(worker: Any) -> dict[str, Mapping[str, float]]:
    """Time the ends of steps in a worker, all ranks at once.

    Args:
        worker: vLLM's, whose caches are bound.

    Returns:
        Microseconds, by kind of step and by whether ranks agree.
    """
    builder: Any = roco_layers(worker.vllm_config)[0].impl
    builder = builder.builder()
    eviction: CudaEviction = builder._eviction
    ranks = eviction._ranks
    found: dict[str, Mapping[str, float]] = {}
    for has_prompts in (False, True):
        for rows in ROWS:
            step: StepBuffers = builder._buffers.rows(0, rows)
            step.evicted_before.zero_()
            step.evicted_after.zero_()
            times = {}
            for name, them in (("alone", None), ("agreeing", ranks)):
                eviction._ranks = them
                times[name] = _time(eviction, step, has_prompts)
            kind = "prompts" if has_prompts else "decodes"
            found[f"{kind}, {rows} rows"] = times
    return found


def _time(eviction: CudaEviction, step: StepBuffers, has_prompts: bool) -> float:
    device = step.live_table.device
    seq_lens = torch.ones(len(step.live_table), dtype=torch.int32, device=device)
    graph = torch.cuda.CUDAGraph()
    with (
        graph_capture(device=device) as context,
        torch.cuda.graph(graph, stream=context.stream),
    ):
        for _ in range(CALLS):
            eviction.evict(step, seq_lens, has_prompts=has_prompts)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        # the first round warms up
        torch.cuda.synchronize()
        get_tp_group().barrier()
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return round(1e3 * milliseconds / (CALLS * REPLAYS), 2)


if __name__ == "__main__":
    sys.exit(main())
