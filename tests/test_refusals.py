# SPDX-License-Identifier: Apache-2.0
"""Everything that RoCo refuses, by the message that a user of vLLM gets to see.

Each message says what is wrong, which value, what is allowed and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config
from vllm import LLM, ModelRegistry, SamplingParams, envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform, PlatformEnum
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.scheduler import Scheduler

from tests.engine.engines import running_engine
from tests.engine.tiny_models import random_prompt
from tests.model_configs import TINY, save_config
from tests.oracle import Options
from vllm_roco.attention import backend
from vllm_roco.cpu_platform import RocoCpuPlatform
from vllm_roco.kv_cache.manager import RocoManager
from vllm_roco.scheduler import RocoSchedulerMixin

OPTIONS = {"budget": 128, "stride": 32, "chunk": 64}


@dataclass(frozen=True)
class Case:
    """Engine arguments that are refused, and what the message has to say.

    Attributes:
        says: Parts of the message, in order.
        options: Put over `OPTIONS`.
        arguments: Of `EngineArgs`.
    """

    says: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


def arguments_of(model: Path, case: Case) -> dict[str, Any]:
    return {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 1024,
        "enforce_eager": True,
        "attention_backend": "roco",
        "additional_config": {"roco": OPTIONS | case.options},
    } | case.arguments


def engine_config(model: Path, case: Case) -> VllmConfig:
    return EngineArgs(**arguments_of(model, case)).create_engine_config()


def refused(message: str, case: Case) -> None:
    place = message.find("roco: ")
    for part in case.says:
        place = message.find(part, place)
        assert place >= 0, f"{part!r} is not in {message!r}"


class ForeignScheduler(Scheduler):
    """A scheduler of the user's own that knows nothing of RoCo."""


BAD_OPTIONS = {
    "unknown-key": Case(
        ("'budgets' = 64", "Allowed keys are policy, ", "Correct or remove"),
        {"budgets": 64},
    ),
    "policy": Case(("policy = 'h2o'", '"roco" or "recent"'), {"policy": "h2o"}),
    "shield": Case(("shield = 'mean'", '"peak" or "deviation"'), {"shield": "mean"}),
    "shield-ratio": Case(
        ("shield_ratio = 1.5", "a number from 0 to 1"), {"shield_ratio": 1.5}
    ),
    "budget-text": Case(("budget = '128'", "a whole number"), {"budget": "128"}),
    "budget-zero": Case(("budget = 0", "at least 1"), {"budget": 0}),
    "stride-fraction": Case(("stride = 32.0", "a whole number"), {"stride": 32.0}),
    "chunk-negative": Case(("chunk = -64", "at least 1"), {"chunk": -64}),
    "sink-negative": Case(("sink = -1", "at least 0"), {"sink": -1}),
    "recent-bool": Case(("recent = True", "a whole number"), {"recent": True}),
    "trace-empty": Case(("trace = ''", "a file path"), {"trace": ""}),
    "trace-in-no-directory": Case(
        ("trace = '/no/t.jsonl'", "No such file or directory", "an existing directory"),
        {"trace": "/no/t.jsonl"},
    ),
    "trace-is-a-directory": Case(
        ("trace = '/'", "Is a directory", "or leave trace out"), {"trace": "/"}
    ),
    "protected": Case(
        ("sink + recent is 100 + 100 = 200", "budget = 128", "Lower sink or recent"),
        {"sink": 100, "recent": 100},
    ),
    "protected-blocks": Case(
        ("sink = 57 and recent = 65", "144 tokens", "budget = 128", "Lower them"),
        {"sink": 57, "recent": 65},
    ),
    "budget-blocks": Case(
        ("budget = 100", "block size (16", "96 or 112"), {"budget": 100}
    ),
    "stride-blocks": Case(("stride = 8", "block size (16", "Use 16"), {"stride": 8}),
    "chunk-blocks": Case(("chunk = 72", "block size (16", "64 or 80"), {"chunk": 72}),
    "larger-blocks": Case(
        ("stride = 32", "block size (64", "Use 64"), arguments={"block_size": 64}
    ),
    "not-a-dictionary": Case(
        ("additional_config['roco'] is 512", "must be a dictionary"),
        arguments={"additional_config": {"roco": 512}},
    ),
}

BAD_SETTINGS = {
    "block-size-8": Case(
        ("block_size = 8", "multiple of 16", "Leave --block-size out"),
        arguments={"block_size": 8},
    ),
    "block-size-24": Case(
        ("block_size = 24", "multiple of 16", "16, 32, 64 or 128"),
        arguments={"block_size": 24},
    ),
    "batched-tokens": Case(
        ("max_num_batched_tokens = 67", "4 + 64 = 68", "--max-num-batched-tokens 68"),
        arguments={"max_num_batched_tokens": 67, "max_model_len": 65},
    ),
    "batched-tokens-of-short-sequences": Case(
        ("max_num_batched_tokens = 66", "4 + 63 = 67", "--max-num-batched-tokens 67"),
        arguments={"max_num_batched_tokens": 66, "max_model_len": 64},
    ),
    "scheduled-tokens": Case(
        ("max_num_scheduled_tokens = 67", "= 68", "--max-num-scheduled-tokens 68"),
        arguments={"max_num_scheduled_tokens": 67},
    ),
    "chunked-prefill": Case(
        ("enable_chunked_prefill = False", "chunks of 64", "Leave"),
        arguments={"enable_chunked_prefill": False},
    ),
    "long-prefill": Case(
        ("long_prefill_token_threshold = 32", "at least 64", "at most 32"),
        arguments={"long_prefill_token_threshold": 32},
    ),
    "long-prefill-adaptive": Case(
        ("long_prefill_token_threshold = 48", "at least 64", "at most 48"),
        arguments={
            "long_prefill_token_threshold": 48,
            "long_prefill_token_threshold_adaptive": True,
        },
    ),
    "scheduler": Case(
        ("ForeignScheduler", "Leave --scheduler-cls out", "RocoSchedulerMixin"),
        arguments={"scheduler_cls": ForeignScheduler},
    ),
    "speculation": Case(
        ("speculative_config = 'ngram'", "Leave --speculative-config out"),
        arguments={
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 2,
                "prompt_lookup_max": 2,
            }
        },
    ),
    "kv-connector": Case(
        ("kv_transfer_config = 'ExampleConnector'", "Leave --kv-transfer-config"),
        arguments={
            "kv_transfer_config": {
                "kv_connector": "ExampleConnector",
                "kv_role": "kv_both",
            }
        },
    ),
    "kv-offloading": Case(
        ("kv_offloading_size = 1", "Leave --kv-offloading-size out"),
        arguments={"kv_offloading_size": 1},
    ),
    "dcp": Case(
        ("decode_context_parallel_size = 2", "Use 1"),
        arguments={"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
    ),
    "pcp": Case(
        ("prefill_context_parallel_size = 2", "Use 1"),
        arguments={"prefill_context_parallel_size": 2},
    ),
    "dbo": Case(
        ("enable_dbo = True", "Leave --enable-dbo out"),
        arguments={"enable_dbo": True},
    ),
    "ubatch": Case(("ubatch_size = 2", "Use 0"), arguments={"ubatch_size": 2}),
    "fp8": Case(
        ("kv_cache_dtype = 'fp8'", "auto, float16, bfloat16"),
        arguments={"kv_cache_dtype": "fp8"},
    ),
    "diffusion": Case(
        ("is a diffusion model", "Serve a model of"),
        arguments={"diffusion_config": {"canvas_length": 32}},
    ),
    "fast-prefill": Case(
        ("kv_sharing_fast_prefill = True", "Leave --kv-sharing-fast-prefill out"),
        arguments={"kv_sharing_fast_prefill": True},
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that RoCo serves."""
    folder = tmp_path_factory.mktemp("llama")
    return save_config(folder, "llama", "LlamaForCausalLM")


def test_what_the_cases_change_is_accepted_without_the_change(llama: Path) -> None:
    """Or every case below could be refused for a reason of its own."""
    config = engine_config(llama, Case(()))
    assert config.attention_config.backend.name == "ROCO"


@pytest.mark.parametrize("name", BAD_OPTIONS | BAD_SETTINGS)
def test_start_is_refused(llama: Path, name: str) -> None:
    case = (BAD_OPTIONS | BAD_SETTINGS)[name]
    with pytest.raises((ValueError, NotImplementedError)) as error:
        engine_config(llama, case)
    refused(str(error.value), case)


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_sequences_shorter_than_a_chunk_need_no_room_for_one(
    llama: Path, max_num_seqs: int
) -> None:
    """A server of one short sequence was asked for room that no prompt can fill."""
    tokens = max_num_seqs + 255
    case = Case(
        (),
        {"chunk": 512},
        {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": tokens},
    )
    assert engine_config(llama, case).scheduler_config.max_num_batched_tokens == tokens


def test_a_scheduler_with_the_mixin_is_accepted(llama: Path) -> None:
    class Derived(RocoSchedulerMixin, ForeignScheduler):
        """The user's scheduler, with RoCo's chunks."""

    config = engine_config(llama, Case((), arguments={"scheduler_cls": Derived}))
    assert config.scheduler_config.scheduler_cls is Derived


@dataclass(frozen=True)
class Model:
    """A kind of model that is refused.

    Attributes:
        model_class: Where vLLM has it: module and class.
        model_type: Of the Hugging Face configuration.
        changes: Of `TINY`.
        case: What is said.
    """

    model_class: str
    model_type: str
    case: Case
    changes: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Write the configuration, and let vLLM know the class without looking.

        vLLM inspects a model class that it does not know in a process of its own,
        which takes longer than the refusal.
        """
        architecture = self.model_class.rpartition(".")[2]
        monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
        ModelRegistry.register_model(
            architecture, resolve_obj_by_qualname(self.model_class)
        )
        return save_config(folder, self.model_type, architecture, **self.changes)


MODELS = {
    "mla": Model(
        "vllm.model_executor.models.deepseek_v2.DeepseekV2ForCausalLM",
        "deepseek_v2",
        Case(("has multi-head latent attention (MLA)", "Serve a model of")),
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "hybrid": Model(
        "vllm.model_executor.models.jamba.JambaForCausalLM",
        "jamba",
        Case(("has state-space (Mamba) layers", "Serve a model of")),
        {"attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "mamba": Model(
        "vllm.model_executor.models.mamba.MambaForCausalLM",
        "mamba",
        Case(("has state-space (Mamba) layers", "Serve a model of")),
    ),
    "encoder-decoder": Model(
        "vllm.model_executor.models.whisper.WhisperForConditionalGeneration",
        "whisper",
        Case(("is an encoder-decoder model", "Serve a model of")),
    ),
    "pooling": Model(
        "vllm.model_executor.models.bert.BertModel",
        "bert",
        Case(("runner = 'pooling'", "Serve a model that generates text")),
    ),
    "multimodal-prefix": Model(
        "vllm.model_executor.models.llama.LlamaForCausalLM",
        "llama",
        Case(("attends to multimodal inputs in both directions", "Serve a model of")),
        {"is_mm_prefix_lm": True},
    ),
    "chunked-local": Model(
        "vllm.model_executor.models.llama4.Llama4ForCausalLM",
        "llama4_text",
        Case(("has chunked-local attention", "Serve a model of")),
        {"attention_chunk_size": 64},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = MODELS[name]
    folder = model.save(tmp_path, monkeypatch)
    with pytest.raises(NotImplementedError) as error:
        engine_config(folder, model.case)
    refused(str(error.value), model.case)


LAYERS = {
    "alibi": Model(
        "vllm.model_executor.models.bloom.BloomForCausalLM",
        "bloom",
        Case(("ALiBi", "is not supported", "another --attention-backend")),
        {"n_layer": 1, "n_head": 4},
    ),
    "sliding-window": Model(
        "vllm.model_executor.models.mistral.MistralForCausalLM",
        "mistral",
        Case(("sliding-window layers", "backend_per_kind", "CPU_ATTN")),
        {"sliding_window": 64},
    ),
    "sinks": Model(
        "vllm.model_executor.models.gpt_oss.GptOssForCausalLM",
        "gpt_oss",
        Case(("attention sinks of the model", "another --attention-backend")),
        {"num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "kv-sharing": Model(
        "vllm.model_executor.models.gemma3n.Gemma3nForCausalLM",
        "gemma3n_text",
        Case(("sharing the KV cache of layer 'model.layers.0.",)),
        {
            "num_kv_shared_layers": 1,
            "layer_types": ["full_attention"] * 2,
            "vocab_size_per_layer_input": 256,
            "hidden_size_per_layer_input": 16,
            "activation_sparsity_pattern": [0.0] * 2,
            "laurel_rank": 8,
            "intermediate_size": [64] * 2,
            "altup_num_inputs": 2,
        },
    ),
    "bidirectional": Model(
        "vllm.model_executor.models.llama.LlamaForCausalLM",
        "llama",
        Case(("attention type",)),
        {"is_causal": False},
    ),
}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine in this process, so that its errors arrive here."""
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    yield
    envs.disable_envs_cache()


@pytest.mark.engine
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_refused(
    in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = LAYERS[name]
    folder = model.save(tmp_path, monkeypatch)
    with pytest.raises((ValueError, NotImplementedError)) as error:
        LLM(**arguments_of(folder, model.case))
    refused(str(error.value), model.case)


def save_gemma2(folder: Path) -> Path:
    """Write a model of which every other layer has a window, with random weights."""
    torch.manual_seed(0)
    config = Gemma2Config(**TINY, sliding_window=64, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def budget_of(tokens: int) -> Options:
    return Options(
        policy="roco",
        shield="peak",
        shield_ratio=0.7,
        budget=tokens,
        stride=32,
        chunk=64,
        sink=16,
        recent=32,
        block_size=16,
    )


@pytest.mark.engine
def test_windows_with_another_backend_are_served(tmp_path: Path) -> None:
    """What the message advises works: one table is evicted, the other is not."""
    model = save_gemma2(tmp_path)
    windows = {"attention_config": {"backend_per_kind": {"sliding_window": "CPU_ATTN"}}}
    prompts = [random_prompt(length, seed=length) for length in (30, 150)]
    with running_engine(model, None, max_model_len=512) as engine:
        expected = engine.generate_one_by_one(prompts, 60)
    with running_engine(model, budget_of(512), max_model_len=512, **windows) as engine:
        assert engine.generate_one_by_one(prompts, 60) == expected
    with running_engine(model, budget_of(96), max_model_len=512, **windows) as engine:
        engine.generate(prompts, 60)
        managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
        (roco,) = [m for m in managers if isinstance(m, RocoManager)]
        assert len(managers) == 2
        # 209 computed tokens are 3 strides over the budget
        assert roco.num_freed_blocks == 6
        assert (
            roco.block_pool.get_num_free_blocks() == roco.block_pool.num_gpu_blocks - 1
        )


@pytest.mark.engine
def test_scheduler_without_layers_is_refused(in_process: None, llama: Path) -> None:
    case = Case(
        ("RocoScheduler serves layers", "no layer uses it", "Add --attention-backend"),
        arguments={
            "attention_backend": None,
            "scheduler_cls": "vllm_roco.scheduler.RocoScheduler",
        },
    )
    with pytest.raises(ValueError) as error:
        LLM(**arguments_of(llama, case))
    refused(str(error.value), case)


def test_a_trace_is_checked_and_left_alone(llama: Path, tmp_path: Path) -> None:
    new, old = tmp_path / "new.jsonl", tmp_path / "old.jsonl"
    old.write_text("{}\n")
    for path in (new, old):
        engine_config(llama, Case((), {"trace": str(path)}))
    assert not new.exists()
    assert old.read_text() == "{}\n"


def test_seeds_are_refused_for_rocos_engines_only(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever engine was configured last decided for every engine of a process."""
    monkeypatch.setattr(RocoCpuPlatform, "_configured", set())
    prompt: Any = {"type": "token", "prompt_token_ids": [1]}
    random, greedy = (SamplingParams(seed=7, temperature=t) for t in (1, 0))
    engine_config(llama, Case(()))
    current_platform.validate_request(prompt, greedy)
    with pytest.raises(VLLMValidationError) as error:
        current_platform.validate_request(prompt, random)
    refused(str(error.value), Case(("seed = 7", "temperature = 1", "Leave seed out")))
    # from here on only the engine's scheduler can tell
    engine_config(llama, Case((), arguments={"attention_backend": None}))
    current_platform.validate_request(prompt, random)


@pytest.mark.parametrize("kind", [PlatformEnum.ROCM, PlatformEnum.XPU])
def test_platform_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: PlatformEnum
) -> None:
    class OtherPlatform(Platform):
        _enum = kind
        device_name = kind.name.lower()

    monkeypatch.setattr(backend, "current_platform", OtherPlatform())
    for ask in (backend.RocoBackend.get_impl_cls, backend.RocoBackend.get_builder_cls):
        with pytest.raises(NotImplementedError) as error:
            ask()
        says = (f"platform '{kind.name.lower()}'", "another --attention-backend")
        refused(str(error.value), Case(says))
