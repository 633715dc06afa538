# SPDX-License-Identifier: Apache-2.0
"""Prints the tokens of one prompt that a scheduler with a hook schedules, by step."""

import json
from pathlib import Path

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_SIZE = 32
NUM_BLOCKS = 16
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}


class ChunkedScheduler(Scheduler):
    """Ends chunks through the hook that the patch adds."""

    def limit_new_tokens(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Allow 48 tokens of a prompt in a step."""
        return min(num_new_tokens, 48)


model = Path("model")
model.mkdir()
(model / "config.json").write_text(json.dumps(MODEL))
vllm_config = EngineArgs(
    model=str(model),
    skip_tokenizer_init=True,
    block_size=BLOCK_SIZE,
    max_num_batched_tokens=256,
    max_num_seqs=4,
    enable_prefix_caching=False,
).create_engine_config()
vllm_config.cache_config.num_gpu_blocks = NUM_BLOCKS
layer = FullAttentionSpec(
    block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.bfloat16
)
scheduler = ChunkedScheduler(
    vllm_config,
    KVCacheConfig(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)],
    ),
    StructuredOutputManager(vllm_config),
    block_size=BLOCK_SIZE,
)
scheduler.add_request(
    Request("request", list(range(100)), SamplingParams(max_tokens=4), None)
)
steps = [scheduler.schedule().total_num_scheduled_tokens for _ in range(3)]
print(json.dumps(steps))
