# SPDX-License-Identifier: Apache-2.0
"""An engine in processes of its own, without a server in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from tests.model_configs import save_config
from vllm_roco.metrics import get_metrics

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("engine_processes")]

BUDGET = 64
STRIDE = 32


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "model": str(save_config(folder, "llama", "LlamaForCausalLM")),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "num_gpu_blocks_override": 64,
        "enforce_eager": True,
        "attention_backend": "roco",
        "additional_config": {
            "roco": {"budget": BUDGET, "stride": STRIDE, "chunk": 64}
        },
    }


def sampling(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        **changes,
    )


async def generate(engine: AsyncLLM, request_id: str, prompt: Any) -> tuple[int, str]:
    """Return how many tokens a request received, and how it finished."""
    received = 0
    reason = "none"
    parameters = sampling(40, output_kind=RequestOutputKind.DELTA)
    async for output in engine.generate(prompt, parameters, request_id):
        received += len(output.outputs[0].token_ids)
        reason = output.outputs[0].finish_reason or reason
    return received, reason


async def input_stream(pause: float) -> AsyncGenerator[StreamingInput, None]:
    for _ in range(2):
        yield StreamingInput(prompt={"prompt_token_ids": [3] * 20})
        await asyncio.sleep(pause)


async def serve_streams(folder: Path) -> None:
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments(folder)))
    prompt = {"prompt_token_ids": [5] * 100}
    try:
        # alone, and among others; the input ends before its refusal, and after it
        assert await generate(engine, "alone", input_stream(0.2)) == (0, "error")
        others = [generate(engine, f"other-{n}", prompt) for n in range(2)]
        refused = [generate(engine, f"stream-{n}", input_stream(n)) for n in (0, 0.1)]
        answers = await asyncio.gather(*others, *refused)
        assert answers == [(40, "length")] * 2 + [(0, "error")] * 2
        assert await generate(engine, "after", prompt) == (40, "length")
        # no step is left to be done: vLLM's end of a stream was not scheduled
        assert get_metrics(engine).max_sequence_kv_tokens == 0
    finally:
        engine.shutdown()


def test_streamed_input_is_refused_alone(tmp_path: Path) -> None:
    asyncio.run(serve_streams(tmp_path))
