# SPDX-License-Identifier: Apache-2.0
"""Engines that live inside the test's own process, one after another.

In one process a test can look at the scheduler, the block manager and the pages while
the engine runs, and can put a recorder between them.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, ModelRegistry, SamplingParams, envs
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.attention import Attention
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.utils import import_utils
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from tests.oracle import Options
from tests.quick_start.nursery import UNCOMPILED
from vllm_roco.attention.impl import RocoImpl
from vllm_roco.kv_cache.manager import RocoManager

Prompt = Sequence[int]

_ARGUMENTS: dict[str, Any] = dict(
    # another order of additions does not change a float32 token
    dtype="float32",
    enforce_eager=True,
    skip_tokenizer_init=True,
    disable_log_stats=True,
    # most tests look at what happens to a prompt that is read
    enable_prefix_caching=False,
    max_model_len=1024,
    max_num_seqs=8,
    max_num_batched_tokens=512,
    # memory is touched when the pool is made, and most tests need little
    num_gpu_blocks_override=512,
)


class Engine:
    """A vLLM engine that generates greedily from token ids."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @property
    def core(self) -> EngineCore:
        """The engine core, which lives in this process."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Scheduler:
        """The engine core's scheduler."""
        return self.core.scheduler

    @property
    def manager(self) -> RocoManager:
        """The block manager of RoCo's only KV cache group."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        (manager,) = [one for one in managers if isinstance(one, RocoManager)]
        return manager

    def cached_blocks(self, prompt: Prompt) -> list[int]:
        """Return the blocks that requests with a prompt could begin with now."""
        pool = self.manager.block_pool
        request = Request(
            request_id="asks",
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            block_hasher=self.core.request_block_hasher,
        )
        found = [pool.get_cached_block(key, [0]) for key in request.block_hashes]
        return [block.block_id for blocks in found if blocks for block in blocks]

    @property
    def layers(self) -> dict[str, Attention]:
        """The attention layers by name; the worker lives in this process too."""
        return get_layers_from_vllm_config(self.core.vllm_config, Attention)

    @property
    def kv_caches(self) -> list[torch.Tensor]:
        """K and V of RoCo's layers, `[num_blocks, num_kv_heads, block_size, ...]`."""
        return [
            layer.impl.page_shape.states_view(layer.kv_cache)
            for layer in self.layers.values()
            if isinstance(layer.impl, RocoImpl)
        ]

    @property
    def other_kv_caches(self) -> list[torch.Tensor]:
        """Caches of the layers that are left to vLLM, `[num_blocks, ...]`."""
        return [
            layer.kv_cache
            for layer in self.layers.values()
            if not isinstance(layer.impl, RocoImpl)
        ]

    @property
    def num_lost_blocks(self) -> int:
        """Blocks that are not free; none must be left when all requests are done."""
        pool = self.manager.block_pool
        # one more is vLLM's null block
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def run(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int,
        *,
        priorities: list[int] | None = None,
        extra_args: Sequence[dict[str, Any]] | None = None,
        adapter: LoRARequest | Sequence[LoRARequest | None] | None = None,
        **sampling: Any,
    ) -> list[RequestOutput]:
        """Generate for all prompts at once; no token ends a sequence early."""
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=own,
                **sampling,
            )
            for own in extra_args or [None] * len(prompts)
        ]
        return self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            params,
            use_tqdm=False,
            priority=priorities,
            lora_request=adapter,
        )

    def complete(
        self, prompts: Sequence[Prompt], max_tokens: int, **arguments: Any
    ) -> list[CompletionOutput]:
        """Return what `run` generates, without what it says of the requests."""
        outputs = self.run(prompts, max_tokens, **arguments)
        return [output.outputs[0] for output in outputs]

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int,
        **arguments: Any,
    ) -> list[tuple[int, ...]]:
        """Return the generated tokens of all prompts, sent at once."""
        outputs = self.complete(prompts, max_tokens, **arguments)
        return [tuple(output.token_ids) for output in outputs]

    def log_probabilities(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Return those of the prompts' tokens, which no choice of another changes."""
        return torch.tensor(
            [
                # the token itself comes first, with or without the likeliest
                next(iter(position.values())).logprob
                for output in self.run(prompts, 1, prompt_logprobs=0)
                for position in output.prompt_logprobs[1:]
            ]
        )

    def generate_one_by_one(
        self, prompts: Sequence[Prompt], max_tokens: int, **arguments: Any
    ) -> list[tuple[int, ...]]:
        """Return the generated tokens of all prompts, each sent alone."""
        return [
            self.generate([prompt], max_tokens, **arguments)[0] for prompt in prompts
        ]


def roco_arguments(options: Options) -> dict[str, Any]:
    """Return the arguments of `LLM` that stand for an oracle's options."""
    return dict(
        attention_backend="roco",
        block_size=options.block_size,
        additional_config={
            "roco": {
                name: getattr(options, name)
                for name in (
                    *("policy", "shield", "shield_ratio"),
                    *("budget", "stride", "chunk", "sink", "recent"),
                )
            }
            # the oracle's chunks are all alike
            | {"turn_end_token_ids": []}
        },
    )


@contextlib.contextmanager
def engines_in_process() -> Iterator[None]:
    """Let engines start in this process, and take away what they leave in it."""
    # an earlier engine may have had the variables kept
    envs.disable_envs_cache()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # bound threads crawl where anything else uses their core
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        # a worker replaces it for good
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        # vLLM asks for nine collections, most of a short engine's life, and then thaws
        # what was there before, so that each one after would look at all of it
        for name in ("collect", "freeze", "unfreeze"):
            patch.setattr(gc, name, lambda *_: 0)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()
    torch.set_num_threads(threads)
    gc.collect()


def model_class(architecture: str) -> type[torch.nn.Module]:
    """Import a model's class, as if there were no numba.

    Some import it, and its llvmlite has an object that answers to every name. Engines
    that start later in the same process look through all modules, and fail on it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_utils, "is_numba_available", lambda: False, raising=False)
        return ModelRegistry.models[architecture].load_model_cls()


@contextlib.contextmanager
def imported_model_class(model: Path) -> Iterator[None]:
    """Let vLLM know a model's class without looking at it in a process of its own.

    That process imports all of vLLM, which takes longer than most of these engines.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (architecture,) = config["architectures"]
    registered = ModelRegistry.models[architecture]
    ModelRegistry.register_model(architecture, model_class(architecture))
    try:
        yield
    finally:
        ModelRegistry.models[architecture] = registered


@contextlib.contextmanager
def running_engine(
    model: Path, options: Options | None, **arguments: Any
) -> Iterator[Engine]:
    """Run an engine in this process, and take it down so that another can follow.

    Args:
        model: A Hugging Face folder.
        options: Of the plugin; None for vLLM's stock backend.
        arguments: Of `LLM`, over this module's own.
    """
    chosen = {} if options is None else roco_arguments(options)
    chosen = {**_ARGUMENTS, **chosen, **arguments}
    with (
        engines_in_process(),
        imported_model_class(model),
        pytest.MonkeyPatch.context() as patch,
    ):
        if chosen["enforce_eager"]:
            # vLLM still has a rank's share of the embedding compiled, a second in each
            patch.setenv(UNCOMPILED, "1")
        llm = LLM(str(model), **chosen)
        try:
            yield Engine(llm)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
