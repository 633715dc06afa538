# SPDX-License-Identifier: Apache-2.0
"""Models and layers that RoCo refuses, before or while the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, ModelRegistry

from tests.engine.engines import model_class
from tests.model_configs import save_config
from tests.refusals.cases import Case, arguments_of, engine_config, refused


@dataclass(frozen=True)
class Model:
    """A kind of model that is refused.

    Attributes:
        architecture: vLLM's name of the class.
        model_type: Of the Hugging Face configuration.
        case: What is said.
        changes: Of `TINY`.
        needs: A package that vLLM's class imports and its CPU build does not bring.
    """

    architecture: str
    model_type: str
    case: Case
    changes: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None

    def save(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Write the configuration, and let vLLM know the class without looking.

        vLLM inspects a model class that it does not know in a process of its own,
        which takes longer than the refusal.
        """
        if self.needs is not None:
            pytest.importorskip(self.needs)
        loaded = model_class(self.architecture)
        monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
        ModelRegistry.register_model(self.architecture, loaded)
        return save_config(folder, self.model_type, self.architecture, **self.changes)


OTHER_MODEL = "Serve a model with layers of full attention"
MLA = Case(("model = '", "has multi-head latent attention (MLA)", OTHER_MODEL))
HYBRID = Case(
    (
        "model = '",
        "has state-space (Mamba) or linear-attention layers",
        "blocks of attention as large as a whole state",
        OTHER_MODEL,
    )
)
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}

MODELS = {
    "deepseek-v2": Model("DeepseekV2ForCausalLM", "deepseek_v2", MLA, LATENT),
    # Kimi K2 and Mistral Large 3 are models of this class
    "deepseek-v3": Model("DeepseekV3ForCausalLM", "deepseek_v3", MLA, LATENT),
    "deepseek-v3.2": Model("DeepseekV32ForCausalLM", "deepseek_v32", MLA, LATENT),
    "glm-4.7-flash": Model("Glm4MoeLiteForCausalLM", "glm4_moe_lite", MLA, LATENT),
    "glm-5": Model("GlmMoeDsaForCausalLM", "glm_moe_dsa", MLA, LATENT),
    "longcat": Model("LongcatFlashForCausalLM", "longcat_flash", MLA, LATENT),
    "kimi-linear": Model("KimiLinearForCausalLM", "kimi_linear", MLA),
    "jamba": Model(
        "JambaForCausalLM",
        "jamba",
        HYBRID,
        {"attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "qwen3-next": Model("Qwen3NextForCausalLM", "qwen3_next", HYBRID),
    "qwen3.5": Model("Qwen3_5ForCausalLM", "qwen3_5_text", HYBRID, needs="torchvision"),
    "olmo-hybrid": Model("OlmoHybridForCausalLM", "olmo_hybrid", HYBRID),
    "nemotron-h": Model("NemotronHForCausalLM", "nemotron_h", HYBRID),
    "granite-4": Model("GraniteMoeHybridForCausalLM", "granitemoehybrid", HYBRID),
    "falcon-h1": Model("FalconH1ForCausalLM", "falcon_h1", HYBRID),
    "lfm2": Model(
        "Lfm2ForCausalLM",
        "lfm2",
        HYBRID,
        {"block_dim": 64, "conv_dim": 64, "full_attn_idxs": [1]},
    ),
    "zamba2": Model(
        "Zamba2ForCausalLM",
        "zamba2",
        HYBRID,
        {
            "layers_block_type": ["mamba", "hybrid"],
            "layer_types": ["mamba", "hybrid"],
        },
    ),
    "mamba": Model(
        "MambaForCausalLM",
        "mamba",
        Case(("model = '", "has no attention layers", OTHER_MODEL)),
    ),
    "encoder-decoder": Model(
        "WhisperForConditionalGeneration",
        "whisper",
        Case(("is an encoder-decoder model", OTHER_MODEL)),
    ),
    "pooling": Model(
        "BertModel",
        "bert",
        Case(("runner = 'pooling'", "Serve a model that generates text")),
    ),
    "multimodal-prefix": Model(
        "LlamaForCausalLM",
        "llama",
        Case(("multimodal inputs in both directions", "--language-model-only")),
        {"is_mm_prefix_lm": True},
    ),
    "mimo-v2": Model(
        "MiMoV2FlashForCausalLM",
        "mimo_v2_flash",
        Case(("bring an attention backend of their own", OTHER_MODEL)),
    ),
    "windows-only": Model(
        "MistralForCausalLM",
        "mistral",
        Case(("every layer", "sliding window of 64 tokens", "Leave")),
        {"sliding_window": 64},
    ),
    "windows-longer-than-sequences": Model(
        "Phi3ForCausalLM",
        "phi3",
        Case(
            (
                "sliding window of 2047 tokens",
                "longer than 256 tokens",
                "--disable-sliding-window",
            )
        ),
        {"sliding_window": 2047, "pad_token_id": 0},
    ),
    "llama-4": Model(
        "Llama4ForCausalLM",
        "llama4_text",
        Case(("has chunked-local attention", OTHER_MODEL)),
        {"attention_chunk_size": 64},
    ),
}


LONGEST_HITS_BESIDE_WINDOWS = Model(
    "Gemma2ForCausalLM",
    "gemma2",
    Case(
        (
            "prefix_hits = 'longest' is not supported",
            "sliding-window layers",
            'Use prefix_hits "exact", or --no-enable-prefix-caching',
        ),
        {"prefix_hits": "longest"},
        {"enable_prefix_caching": True},
    ),
    {"sliding_window": 64},
)
"""Refused for an option: the model itself is served."""


@pytest.mark.parametrize("name", MODELS)
def test_model_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = MODELS[name]
    folder = model.save(tmp_path, monkeypatch)
    with pytest.raises(NotImplementedError) as error:
        engine_config(folder, model.case)
    refused(str(error.value), model.case)


def test_longest_hits_beside_windows_are_no_matter_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LONGEST_HITS_BESIDE_WINDOWS
    folder = model.save(tmp_path, monkeypatch)
    with pytest.raises(NotImplementedError) as error:
        engine_config(folder, model.case)
    refused(str(error.value), model.case)
    without = {"enable_prefix_caching": False}
    engine_config(folder, replace(model.case, arguments=without))


def test_a_window_that_no_sequence_reaches_can_be_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the message says."""
    model = MODELS["windows-longer-than-sequences"]
    folder = model.save(tmp_path, monkeypatch)
    case = Case((), arguments={"disable_sliding_window": True})
    assert engine_config(folder, case).cache_config.sliding_window is None


LAYERS = {
    "alibi": Model(
        "BloomForCausalLM",
        "bloom",
        Case(("ALiBi", "is not supported", "another --attention-backend")),
        {"n_layer": 1, "n_head": 4},
    ),
    "one-kind-of-cache": Model(
        "Gemma2ForCausalLM",
        "gemma2",
        Case(
            ("disable_hybrid_kv_cache_manager = True", "Leave"),
            arguments={"disable_hybrid_kv_cache_manager": True},
        ),
        {"sliding_window": 64},
    ),
    "gemma-3n": Model(
        "Gemma3nForCausalLM",
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
        "LlamaForCausalLM",
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
