# SPDX-License-Identifier: Apache-2.0
"""Models and layers that RoCo refuses, before or while the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, ModelRegistry
from vllm.utils.import_utils import resolve_obj_by_qualname

from tests.model_configs import save_config
from tests.refusals.cases import Case, arguments_of, engine_config, refused


@dataclass(frozen=True)
class Model:
    """A kind of model that is refused.

    Attributes:
        model_class: Where vLLM has it: module of `vllm.model_executor.models`, class.
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
            architecture,
            resolve_obj_by_qualname(f"vllm.model_executor.models.{self.model_class}"),
        )
        return save_config(folder, self.model_type, architecture, **self.changes)


OTHER_MODEL = "Serve a model with layers of full attention"
MAMBA = Case(("has state-space (Mamba) layers", OTHER_MODEL))

MODELS = {
    "mla": Model(
        "deepseek_v2.DeepseekV2ForCausalLM",
        "deepseek_v2",
        Case(("has multi-head latent attention (MLA)", OTHER_MODEL)),
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
        "jamba.JambaForCausalLM",
        "jamba",
        MAMBA,
        {"attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "mamba": Model(
        "mamba.MambaForCausalLM",
        "mamba",
        MAMBA,
    ),
    "encoder-decoder": Model(
        "whisper.WhisperForConditionalGeneration",
        "whisper",
        Case(("is an encoder-decoder model", OTHER_MODEL)),
    ),
    "pooling": Model(
        "bert.BertModel",
        "bert",
        Case(("runner = 'pooling'", "Serve a model that generates text")),
    ),
    "multimodal-prefix": Model(
        "llama.LlamaForCausalLM",
        "llama",
        Case(("multimodal inputs in both directions", "--language-model-only")),
        {"is_mm_prefix_lm": True},
    ),
    "own-backend": Model(
        "mimo_v2.MiMoV2ForCausalLM",
        "llama",
        Case(("bring an attention backend of their own", OTHER_MODEL)),
    ),
    "chunked-local": Model(
        "llama4.Llama4ForCausalLM",
        "llama4_text",
        Case(("has chunked-local attention", OTHER_MODEL)),
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
        "bloom.BloomForCausalLM",
        "bloom",
        Case(("ALiBi", "is not supported", "another --attention-backend")),
        {"n_layer": 1, "n_head": 4},
    ),
    "windows-only": Model(
        "mistral.MistralForCausalLM",
        "mistral",
        Case(("every layer", "sliding window of 64 tokens", "Leave")),
        {"sliding_window": 64},
    ),
    "one-kind-of-cache": Model(
        "gemma2.Gemma2ForCausalLM",
        "gemma2",
        Case(
            ("disable_hybrid_kv_cache_manager = True", "Leave"),
            arguments={"disable_hybrid_kv_cache_manager": True},
        ),
        {"sliding_window": 64},
    ),
    "sinks": Model(
        "gpt_oss.GptOssForCausalLM",
        "gpt_oss",
        Case(("attention sinks of the model", "another --attention-backend")),
        {"num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "kv-sharing": Model(
        "gemma3n.Gemma3nForCausalLM",
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
        "llama.LlamaForCausalLM",
        "llama",
        Case(("attention type",)),
        {"is_causal": False},
    ),
}


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
