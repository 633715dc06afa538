# SPDX-License-Identifier: Apache-2.0
"""Names and settings of vLLM."""

from __future__ import annotations

from vllm_roco.hook_check import Hook

_REGISTRY = "vllm.v1.attention.backends.registry"

NAMING = (
    Hook(
        module="vllm",
        name="",
        why="know the release",
        members=("__version__",),
    ),
    Hook(
        module="vllm.logger",
        name="init_logger",
        why="log as vLLM does",
        calls=("name",),
    ),
    Hook(
        module=_REGISTRY,
        name="register_backend",
        why="name the backend ROCO",
        calls=("backend", "class_path"),
    ),
    Hook(
        module=_REGISTRY,
        name="AttentionBackendEnum",
        why="find the registered member, and pickle it by name",
        members=("register", "get_class", "get_path"),
    ),
)

CONFIGURATION = (
    Hook(
        module="vllm.config",
        name="get_current_vllm_config",
        why="read the options where an attention layer is built",
        calls=(),
    ),
    Hook(
        module="vllm.config",
        name="get_current_vllm_config_or_none",
        why="read the options where vLLM may ask for a spec outside of a config",
        calls=(),
    ),
    Hook(
        module="vllm.config",
        name="get_layers_from_vllm_config",
        why="reach the caches of all layers of a group",
        calls=("vllm_config", "layer_type"),
    ),
    Hook(
        module="vllm.config",
        name="VllmConfig",
        why="read the options, and refuse what does not go together with a budget",
        members=(
            "additional_config",
            "attention_config",
            "cache_config",
            "diffusion_config",
            "instance_id",
            "kv_transfer_config",
            "max_concurrent_batches",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
        ),
    ),
    Hook(
        module="vllm.config",
        name="AttentionConfig",
        why="know whether the backend is selected",
        members=("backend", "backend_per_kind"),
    ),
    Hook(
        module="vllm.config",
        name="CacheConfig",
        why="check the block size, and refuse a quantised cache",
        members=(
            "block_size",
            "cache_dtype",
            "enable_prefix_caching",
            "kv_sharing_fast_prefill",
            "user_specified_block_size",
        ),
    ),
    Hook(
        module="vllm.config.cache",
        name="CacheDType",
        why="name the dtypes of the cache",
    ),
    Hook(
        module="vllm.config",
        name="KVTransferConfig",
        why="name the connector that is refused",
        members=("kv_connector",),
    ),
    Hook(
        module="vllm.config",
        name="ModelConfig",
        why="bound the memory of one sequence, and refuse kinds of models",
        members=(
            "is_attention_free",
            "is_encoder_decoder",
            "is_hybrid",
            "max_model_len",
            "model",
            "runner_type",
            "served_model_name",
            "use_mla",
        ),
    ),
    Hook(
        module="vllm.config",
        name="ParallelConfig",
        why="refuse context parallelism and micro-batches, and tell engines apart",
        members=(
            "data_parallel_index",
            "decode_context_parallel_size",
            "enable_dbo",
            "prefill_context_parallel_size",
            "rank",
            "ubatch_size",
        ),
    ),
    Hook(
        module="vllm.config",
        name="SchedulerConfig",
        why="put the scheduler in place that cuts prompts into chunks",
        members=(
            "async_scheduling",
            "enable_chunked_prefill",
            "get_scheduler_cls",
            "long_prefill_token_threshold",
            "max_num_batched_tokens",
            "max_num_seqs",
            "scheduler_cls",
        ),
    ),
    Hook(
        module="vllm.config",
        name="SpeculativeConfig",
        why="name the speculation that is refused",
        members=("method",),
    ),
)
