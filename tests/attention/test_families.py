# SPDX-License-Identifier: Apache-2.0
"""Which layers of which families of models keep a budget, by vLLM's own model classes.

A model of each family is built, of random numbers and without an engine, so that each
layer asks for its backend, makes its implementation and says what it caches. What RoCo
refuses is in `tests.refusals`; whole engines of the most common kinds are in
`tests.engine`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm.config import (
    VllmConfig,
    get_layers_from_vllm_config,
    set_current_vllm_config,
)
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from tests.engine.engines import imported_model_class
from tests.model_configs import TINY, save_config
from tests.refusals.test_models import LAYERS, MODELS
from vllm_roco.attention.layers import describe_other_layers, roco_layers
from vllm_roco.kv_cache.spec import RocoSpec

NUM_LAYERS = 4
WINDOW = 64
"""Tokens."""

_EXPERTS: dict[str, Any] = dict(
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_shared_experts=1,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
_NO_WINDOW: dict[str, Any] = dict(sliding_window=None)
_WINDOWS: dict[str, Any] = dict(
    sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2
)
_LLAMA_LIKE: dict[str, Any] = dict(
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
)
"""What a family's own code would fill in where only the checkpoint has it."""


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        architecture: vLLM's name of the class.
        model_type: Of the Hugging Face configuration.
        changes: Of `TINY`.
        needs: A package that vLLM's class imports and its CPU build does not bring.
        has_own_config: Whether the configuration has a class of vLLM's, or of the
            checkpoint's, and is written as it stands.
    """

    architecture: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    has_own_config: bool = False


FULL = {
    "llama": Family("LlamaForCausalLM", "llama"),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3"),
    "qwen3-moe": Family("Qwen3MoeForCausalLM", "qwen3_moe", _EXPERTS),
    "qwen3-vl": Family(
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        {"text_config": TINY | {"num_hidden_layers": NUM_LAYERS}},
        needs="torchvision",
    ),
    "mistral": Family("MistralForCausalLM", "mistral", _NO_WINDOW),
    "ministral-3": Family("Ministral3ForCausalLM", "ministral3"),
    "mixtral": Family("MixtralForCausalLM", "mixtral", _EXPERTS | _NO_WINDOW),
    "phi-3": Family("Phi3ForCausalLM", "phi3", _NO_WINDOW),
    "glm-4": Family("Glm4ForCausalLM", "glm4"),
    "glm-4.5": Family("Glm4MoeForCausalLM", "glm4_moe", _EXPERTS),
    "minimax-m2": Family(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        _EXPERTS | {"rotary_dim": 16, "scoring_func": "sigmoid"},
    ),
    "hunyuan-v1": Family("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense"),
    "hunyuan-v3": Family(
        "HYV3ForCausalLM",
        "hy_v3",
        _EXPERTS | {"expert_hidden_dim": 32, "route_norm": True},
    ),
    "ernie-4.5": Family("Ernie4_5ForCausalLM", "ernie4_5"),
    "ernie-4.5-moe": Family(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    ),
    "bailing-v2": Family(
        "BailingMoeV2ForCausalLM",
        "bailing_moe_v2",
        _LLAMA_LIKE
        | _EXPERTS
        | {
            "norm_topk_prob": True,
            "use_bias": False,
            "use_qkv_bias": False,
            "embedding_dropout": 0.0,
            "score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
        },
        has_own_config=True,
    ),
    "seed-oss": Family("SeedOssForCausalLM", "seed_oss"),
    "smollm3": Family("SmolLM3ForCausalLM", "smollm3"),
    "granite": Family("GraniteForCausalLM", "granite"),
    "olmo-2": Family("Olmo2ForCausalLM", "olmo2"),
    "rnj-1": Family(
        "Rnj1ForCausalLM",
        "gemma3_text",
        {"layer_types": ["full_attention"] * NUM_LAYERS},
    ),
}
"""Families all of whose layers have full attention."""

MIXED = {
    "gemma-2": Family("Gemma2ForCausalLM", "gemma2", _WINDOWS),
    "gemma-3": Family("Gemma3ForCausalLM", "gemma3_text", _WINDOWS),
    "cohere-2": Family("Cohere2ForCausalLM", "cohere2", _WINDOWS),
    "cohere-2-moe": Family("Cohere2MoeForCausalLM", "cohere2_moe", _WINDOWS | _EXPERTS),
    "olmo-3": Family("Olmo3ForCausalLM", "olmo3", _WINDOWS),
    "exaone-4": Family("Exaone4ForCausalLM", "exaone4", _WINDOWS),
    "afmoe": Family(
        "AfmoeForCausalLM",
        "afmoe",
        _WINDOWS
        | _EXPERTS
        | {
            "num_dense_layers": 1,
            "score_func": "sigmoid",
            "route_norm": True,
            "route_scale": 1.0,
        },
    ),
    "step-3.5": Family(
        "Step3p5ForCausalLM",
        "step3p5",
        _WINDOWS
        | {
            "num_attention_groups": 2,
            # which vLLM 0.33 does not fill in
            **dict.fromkeys(
                ("use_moe_router_bias", "need_fp32_gate", "norm_expert_weight"), True
            ),
            "moe_router_activation": "sigmoid",
            "moe_router_scaling_factor": 1.0,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "share_expert_dim": 32,
            "moe_intermediate_size": 32,
            "swiglu_limits": None,
            "swiglu_limits_shared": None,
            "att_impl_type": "GQA",
            # layers with a window have more query heads, which is none of RoCo's affair
            "attention_other_setting": {
                "attention_type": "sliding_attention",
                "num_attention_heads": 8,
                "num_attention_groups": 2,
                "head_dim": 32,
            },
        },
        has_own_config=True,
    ),
    "plamo-3": Family(
        "Plamo3ForCausalLM",
        "plamo3",
        _LLAMA_LIKE
        | _WINDOWS
        | {"interleaved_sliding_window": [WINDOW, None] * 2, "rope_local_theta": 1e4},
        has_own_config=True,
    ),
    "apertus": Family("ApertusForCausalLM", "apertus", _WINDOWS),
    "laguna": Family("LagunaForCausalLM", "laguna", _WINDOWS | _EXPERTS),
    "gpt-oss": Family("GptOssForCausalLM", "gpt_oss", _WINDOWS | _EXPERTS),
    "granite-swa": Family("GraniteSWAForCausalLM", "granite_swa", _WINDOWS),
}
"""Families of whose layers every second one has a window here."""


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The process groups that layers look for, also those of experts."""
    folder = tmp_path_factory.mktemp("one-rank")
    config = configure(save(FULL["qwen3-moe"], folder))
    with set_current_vllm_config(config):
        init_distributed_environment(
            world_size=1,
            rank=0,
            distributed_init_method=f"file://{folder / 'rendezvous'}",
            local_rank=0,
            backend="gloo",
        )
        initialize_model_parallel()
    yield
    cleanup_dist_env_and_memory()


def save(family: Family, folder: Path) -> Path:
    """Write the configuration of a family's model."""
    changes = {"num_hidden_layers": NUM_LAYERS, "pad_token_id": 0} | family.changes
    if not family.has_own_config:
        return save_config(folder, family.model_type, family.architecture, **changes)
    head = {"model_type": family.model_type, "architectures": [family.architecture]}
    (folder / "config.json").write_text(json.dumps(head | TINY | changes))
    return folder


def configure(model: Path) -> VllmConfig:
    return EngineArgs(
        model=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
        attention_backend="roco",
        additional_config={"roco": {"budget": 128, "stride": 32, "chunk": 64}},
    ).create_engine_config()


def build(
    family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[VllmConfig, list[Attention]]:
    """Build the model, and return its layers in the order of the model."""
    if family.needs is not None:
        pytest.importorskip(family.needs)
    if family.model_type not in CONFIG_MAPPING:
        # which would be code of the checkpoint
        own = type("Config", (PreTrainedConfig,), {"model_type": family.model_type})
        monkeypatch.setitem(CONFIG_MAPPING._extra_content, family.model_type, own)
    model = save(family, folder)
    with imported_model_class(model):
        config = configure(model)
        with set_current_vllm_config(config), set_default_torch_dtype(torch.float32):
            initialize_model(vllm_config=config)
    return config, list(get_layers_from_vllm_config(config, Attention).values())


@pytest.mark.parametrize("name", FULL)
def test_every_layer_keeps_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, layers = build(FULL[name], tmp_path, monkeypatch)
    assert len(layers) == NUM_LAYERS
    assert roco_layers(config) == layers
    assert describe_other_layers(config) is None
    assert_bounded(config)


@pytest.mark.parametrize("name", MIXED)
def test_layers_with_a_window_are_left_to_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, layers = build(MIXED[name], tmp_path, monkeypatch)
    assert len(layers) == NUM_LAYERS
    assert roco_layers(config) == layers[1::2]
    has_window = [layer.sliding_window is not None for layer in layers]
    assert has_window == [True, False] * 2
    assert describe_other_layers(config) is not None
    assert_bounded(config)


def assert_bounded(config: VllmConfig) -> None:
    """They have one kind of cache, which is bounded, and one number of query heads."""
    layers = roco_layers(config)
    assert len({layer.num_heads for layer in layers}) == 1
    with set_current_vllm_config(config):
        specs = [
            layer.attn_backend.customize_spec(layer.get_kv_cache_spec(config))
            for layer in layers
        ]
    assert isinstance(specs[0], RocoSpec)
    assert all(spec == specs[0] for spec in specs)


def test_each_family_has_a_row_and_a_test() -> None:
    """What the page on compatibility names is a test, and what is tested has a row."""
    page = Path(__file__).parents[2] / "docs" / "compatibility.md"
    _, _, table = page.read_text(encoding="utf-8").partition("## Models")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    names = [name.strip("`") for _, _, name, *_ in rows if name.startswith("`")]
    no_family = {"one-kind-of-cache"}
    assert sorted(names) == sorted([*FULL, *MIXED, *MODELS, *LAYERS.keys() - no_family])
