# SPDX-License-Identifier: Apache-2.0
"""vLLM's platforms and plugins."""

from __future__ import annotations

from vllm_roco.hook_check import Hook

_CPU = "vllm.platforms.cpu"
_FLASH = "vllm.v1.attention.backends.fa_utils"

PLATFORMS = (
    Hook(
        module="vllm.platforms",
        name="current_platform",
        why="know which implementation to use",
    ),
    Hook(
        module="vllm.platforms.interface",
        name="Platform",
        why="know which implementation to use",
        members=("is_cpu", "is_cuda", "is_out_of_tree"),
    ),
    Hook(
        module="vllm.envs",
        name="",
        why="know what the user told vLLM about platforms and plugins",
        members=("VLLM_PLUGINS", "VLLM_TARGET_DEVICE"),
    ),
    Hook(
        module="vllm.utils.import_utils",
        name="resolve_obj_by_qualname",
        why="derive from the CPU platform that vLLM would take",
        calls=("qualname",),
    ),
    Hook(
        module="vllm.platforms",
        name="cpu_platform_plugin",
        why="leave every platform but a CPU build alone",
        calls=(),
    ),
    Hook(
        module="vllm.v1.attention.selector",
        name="AttentionSelectorConfig",
        why="validate a layer on the CPU build",
        members=("head_size",),
    ),
    Hook(
        module=_CPU,
        name="CpuPlatform",
        why="let the CPU build use a registered backend",
        members=("device_name", "device_type"),
        platform="cpu",
    ),
    Hook(
        module=_CPU,
        name="CpuPlatform.get_attn_backend_cls",
        why="let the CPU build use a registered backend",
        overrides="selected_backend, attn_selector_config, num_heads=",
        platform="cpu",
    ),
    Hook(
        module=_CPU,
        name="CpuPlatform.check_and_update_config",
        why="check the options early, and prefer small blocks, on the CPU build",
        overrides="vllm_config",
        platform="cpu",
    ),
    Hook(
        module="vllm.platforms.interface",
        name="Platform.validate_request",
        why="refuse requests that stop the engine of the CPU build",
        overrides="processed_inputs, params",
        platform="cpu",
    ),
    Hook(
        module="vllm.inputs",
        name="EngineInput",
        why="refuse requests that stop the engine of the CPU build",
        platform="cpu",
    ),
    Hook(
        module="vllm.pooling_params",
        name="PoolingParams",
        why="refuse requests that stop the engine of the CPU build",
        platform="cpu",
    ),
    Hook(
        module="vllm.sampling_params",
        name="SamplingParams",
        why="refuse requests that stop the engine of the CPU build",
        members=("sampling_type", "seed", "temperature"),
        platform="cpu",
    ),
    Hook(
        module="vllm.sampling_params",
        name="SamplingType",
        why="refuse requests that stop the engine of the CPU build",
        members=("RANDOM_SEED",),
        platform="cpu",
    ),
    Hook(
        module="vllm.exceptions",
        name="VLLMValidationError",
        why="refuse requests that stop the engine of the CPU build",
        platform="cpu",
    ),
    Hook(
        module=_FLASH,
        name="flash_attn_varlen_func",
        why="attend to prompts on CUDA",
        calls=(
            "q",
            "k",
            "v",
            "max_seqlen_q",
            "cu_seqlens_q",
            "max_seqlen_k",
            "seqused_k",
            "softmax_scale",
            "causal",
            "softcap",
            "block_table",
            "return_softmax_lse",
            "out",
            "fa_version",
        ),
        platform="cuda",
    ),
    Hook(
        module=_FLASH,
        name="reshape_and_cache_flash",
        why="write keys and values on CUDA",
        platform="cuda",
    ),
    Hook(
        module="vllm.v1.attention.backends.utils",
        name="split_decodes_and_prefills",
        why="find where the decodes of a batch end on CUDA",
        calls=("common_attn_metadata",),
    ),
    Hook(
        module=_FLASH,
        name="get_flash_attn_version",
        why="attend to prompts on CUDA",
        calls=(),
        platform="cuda",
    ),
)
