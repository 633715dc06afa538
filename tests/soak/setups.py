# SPDX-License-Identifier: Apache-2.0
"""Which model and which engine arguments a soak has, on either platform."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.engine.mixed_models import save_mixed
from tests.soak.bounds import ServerOptions
from tests.soak.mix import FIRST_TOKEN, Limits

ROCO = {"budget": 128, "stride": 32, "chunk": 64, "sink": 16, "recent": 32}
LIMITS = {"max_budget": 512, "allow_full": True}
TURNS = {"turn_end_token_ids": [*range(FIRST_TOKEN, FIRST_TOKEN + 1000)]}
"""One word in fifty ends a turn, and with it often a chunk."""
BLOCK_SIZE = 16
SERVER = ServerOptions(**ROCO, block_size=BLOCK_SIZE, steps_in_flight=1)
MAX_MODEL_LEN = 1024
MODEL_NAME = "soaked"


def save_small_model(tokenizer_of: Path, folder: Path, *, windows: bool) -> Path:
    """Write a random float32 model that has another one's tokenizer.

    Args:
        tokenizer_of: A folder with a fast tokenizer's files.
        folder: Where to.
        windows: Whether every other layer has a sliding window.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_of / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab_size()
    for file in tokenizer_of.glob("tokenizer*"):
        folder.mkdir(exist_ok=True)
        shutil.copy(file, folder)
    if windows:
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        return save_mixed("olmo3", folder, vocab_size=vocabulary, **special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        # attention is sharp and the text varied
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def engine_arguments(
    *, cuda: bool, dtype: str, max_num_seqs: int, num_blocks: int, adapter: bool
) -> dict[str, Any]:
    """Return arguments of vLLM's `EngineArgs`, without the model.

    Args:
        cuda: Whether they are for a GPU: with graphs, and asynchronous.
        dtype: Of weights and cache.
        max_num_seqs: Most requests in a step.
        num_blocks: Blocks of the cache, fewer than these requests want.
        adapter: Whether requests may bring a LoRA adapter.
    """
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "attention_backend": "roco",
        "additional_config": {"roco": ROCO | LIMITS | TURNS},
        "block_size": BLOCK_SIZE,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + (1024 if cuda else 256),
        "num_gpu_blocks_override": num_blocks,
        # of a GPU, or on a CPU of the host: what must be free for it to start
        "gpu_memory_utilization": 0.1,
        # requests are let in on what is free at the moment, and preempt each other
        "scheduler_reserve_full_isl": False,
        "worker_cls": "tests.soak.worker.PoisoningWorker",
    }
    if adapter:
        # vLLM 0.32 gives what lies in the last place to requests without an adapter,
        # on a CPU beside one with an adapter: that place stays empty
        arguments |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    if cuda:
        return arguments | {
            "scheduler_cls": "tests.soak.audit.AuditedAsyncScheduler",
            "async_scheduling": True,
            # nothing is measured, so others may come and go on the GPU
            "kv_cache_memory_bytes": 2**30,
            "enforce_eager": False,
            # without torch.compile, which takes longer than most of the rest
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        }
    return arguments | {
        "scheduler_cls": "tests.soak.audit.AuditedScheduler",
        "enforce_eager": True,
    }


def rank_arguments(*, tensor: int, pipeline: int, agree: bool) -> dict[str, Any]:
    """Return what changes in `engine_arguments` for several ranks on CPUs.

    Args:
        tensor: Ranks that share each layer's heads.
        pipeline: Stages that share the layers.
        agree: Option of RoCo.
    """
    arguments: dict[str, Any] = {
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "distributed_executor_backend": "mp",
        "additional_config": {"roco": ROCO | LIMITS | TURNS | {"agree": agree}},
        "worker_cls": "tests.soak.rank_worker.WatchedWorker",
    }
    if pipeline > 1:
        # a second stage has no room for what it receives until a run that warms up,
        # which vLLM leaves out on a CPU where nothing is compiled
        arguments["enforce_eager"] = False
        arguments["compilation_config"] = {"mode": 1, "backend": "eager"}
    return arguments


def as_flags(arguments: dict[str, Any]) -> list[str]:
    """Return engine arguments as the command line has them."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            flags += [f"--{flag}", text]
    return flags


def limits_for(vocabulary: int, *, adapter: bool = False) -> Limits:
    """Return what requests must fit."""
    return Limits(
        max_model_len=MAX_MODEL_LEN,
        vocabulary=vocabulary,
        # mode `generation` keeps it with its budget on top, in whole blocks
        longest_kept_prompt=LIMITS["max_budget"] - ROCO["budget"] - 16,
        adapter=adapter,
    )
