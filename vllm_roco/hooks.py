# SPDX-License-Identifier: Apache-2.0
"""Every place where the plugin leans on vLLM, as data.

vLLM promises none of these names. Each is listed once, with what is needed of it and
why, so that a release can be checked before it is used: the installed one by
`vllm_roco.compat.missing_hooks`, any other one by `tools/check_vllm.py`.
"""

from __future__ import annotations

from vllm_roco.hook_check import Hook

_REGISTRY = "vllm.v1.attention.backends.registry"
_BACKEND = "vllm.v1.attention.backend"
_SPEC = "vllm.v1.kv_cache_interface"
_SPEC_REGISTRY = "vllm.v1.kv_cache_spec_registry"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_CPU = "vllm.platforms.cpu"
_FLASH = "vllm.v1.attention.backends.fa_utils"

_NAMING = (
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

_CONFIGURATION = (
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

_ATTENTION = (
    Hook(
        module=_BACKEND,
        name="AttentionBackend",
        why="say what the backend can do, so that vLLM refuses the rest",
        members=(
            "forward_includes_kv_cache_update",
            "supported_dtypes",
            "supported_kv_cache_dtypes",
            "validate_configuration",
        ),
    ),
    Hook(
        module=_BACKEND,
        name="AttentionBackend.get_name",
        why="be found under the registered name",
        overrides="",
    ),
    Hook(
        module=_BACKEND,
        name="AttentionBackend.get_impl_cls",
        why="hand out the implementation of the platform",
        overrides="",
    ),
    Hook(
        module=_BACKEND,
        name="AttentionBackend.get_builder_cls",
        why="hand out the metadata builder of the platform",
        overrides="",
    ),
    Hook(
        module=_BACKEND,
        name="AttentionBackend.customize_spec",
        why="replace a layer's spec by one with a budget",
        overrides="spec",
    ),
    Hook(
        module=_BACKEND,
        name="AttentionBackend.get_supported_kernel_block_sizes",
        why="see whole blocks of the block manager",
        overrides="kv_cache_spec=",
    ),
    Hook(
        module=_BACKEND,
        name="AttentionBackend.supported_kv_cache_layouts",
        why="get pages that are contiguous, with the statistics in their tail",
        overrides="",
    ),
    Hook(
        module=_BACKEND,
        name="AttentionBackend.supports_kv_connector",
        why="refuse connectors, which move blocks by position",
        overrides="",
    ),
    Hook(
        module=_SPEC,
        name="KVCacheLayout",
        why="name the layouts whose pages are contiguous",
        members=("LBHNC", "LBNHC"),
    ),
    Hook(
        module=_BACKEND,
        name="AttentionMetadata",
        why="be what the builder hands to the layers",
    ),
    Hook(
        module=_BACKEND,
        name="MultipleOf",
        why="declare the block sizes",
        members=("base",),
    ),
    Hook(
        module=_BACKEND,
        name="AttentionType",
        why="refuse all but decoders",
        members=("DECODER",),
    ),
    Hook(
        module=_BACKEND,
        name="AttentionCGSupport",
        why="declare full CUDA graphs for decoding",
        members=("UNIFORM_SINGLE_TOKEN_DECODE",),
    ),
    Hook(
        module=_BACKEND,
        name="CommonAttentionMetadata",
        why="build the live table of a step",
        members=(
            "block_table_tensor",
            "compute_num_computed_tokens",
            "max_query_len",
            "max_seq_len",
            "num_actual_tokens",
            "num_reqs",
            "query_start_loc",
            "query_start_loc_cpu",
            "replace",
            "seq_lens",
            "slot_mapping",
        ),
    ),
    Hook(
        module=_BACKEND,
        name="AttentionMetadataBuilder",
        why="keep the tables of a step in buffers that CUDA graphs can read",
        members=("_cudagraph_support", "build_for_cudagraph_capture"),
    ),
    Hook(
        module=_BACKEND,
        name="AttentionMetadataBuilder.__init__",
        why="prepare for the layers of a group once",
        overrides="kv_cache_spec, layer_names, vllm_config, device",
    ),
    Hook(
        module=_BACKEND,
        name="AttentionMetadataBuilder.build",
        why="build the live table of a step",
        overrides="common_prefix_len, common_attn_metadata, fast_build=",
    ),
    Hook(
        module=_BACKEND,
        name="AttentionImpl",
        why="let vLLM refuse context parallelism",
        members=("supports_dcp", "supports_pcp"),
    ),
    Hook(
        module=_BACKEND,
        name="AttentionImpl.__init__",
        why="refuse what a layer may not be",
        overrides=(
            "num_heads, head_size, scale, num_kv_heads=, alibi_slopes=, "
            "sliding_window=, kv_cache_dtype=, logits_soft_cap=, attn_type=, "
            "kv_sharing_target_layer_name="
        ),
    ),
    Hook(
        module=_BACKEND,
        name="AttentionImpl.forward",
        why="attend over the live table, measure, and evict",
        overrides=(
            "layer, query, key, value, kv_cache, attn_metadata, output, "
            "output_scale=, output_block_scale="
        ),
    ),
    # the base class does not declare what vLLM calls, so a stock backend speaks for it
    Hook(
        module="vllm.v1.attention.backends.cpu_attn",
        name="CPUAttentionBackendImpl.do_kv_cache_update",
        why="write keys and values into their slots",
        overrides="layer, key, value, kv_cache, slot_mapping",
    ),
    Hook(
        module=_BACKEND,
        name="AttentionLayer",
        why="tell the layer that attends",
    ),
    Hook(
        module="vllm.model_executor.layers.attention",
        name="Attention",
        why="reach the caches of all layers of a group",
        members=("attn_backend", "kv_cache", "layer_name", "num_heads"),
    ),
    Hook(
        module="vllm.model_executor.models.utils",
        name="extract_layer_index",
        why="know the last layer of a group, which evicts for all of them",
        calls=("layer_name",),
    ),
)

_KV_CACHE = (
    Hook(
        module=_SPEC,
        name="KVCacheSpec",
        why="tell RoCo's layers from others",
    ),
    Hook(
        module=_SPEC,
        name="AttentionSpec",
        why="add the statistics to the page",
        members=(
            "block_size",
            "num_kv_heads",
            "page_size_bytes",
            "page_size_padded",
            "unpadded_page_size_bytes",
        ),
    ),
    Hook(
        module=_SPEC,
        name="AttentionSpec.__post_init__",
        why="size the page on every copy of the spec",
        overrides="",
    ),
    Hook(
        module=_SPEC,
        name="FullAttentionSpec",
        why="recognise the layers that get a budget",
    ),
    Hook(
        module=_SPEC,
        name="AttentionSpec.max_memory_usage_bytes",
        why="tell the truth about the memory of one sequence",
        overrides="vllm_config",
    ),
    Hook(
        module=_SPEC,
        name="AttentionSpec.merge",
        why="keep the budget when layers become one group",
        overrides="specs",
    ),
    Hook(
        module=_SPEC,
        name="AttentionSpec.is_uniform_with_collection",
        why="never share a group with layers that keep everything",
        overrides="kv_cache_specs",
    ),
    Hook(
        module=_SPEC_REGISTRY,
        name="register_kv_cache_spec",
        why="give the spec its own manager",
        calls=("manager_class",),
    ),
    Hook(
        module=_SPEC_REGISTRY,
        name="_REGISTRY_KVCACHESPEC_LIST",
        why="see whether vLLM has registered its own specs",
    ),
    Hook(
        module=_MANAGER,
        name="register_all_kvcache_specs",
        why="register vLLM's own specs before ours, or vLLM would never do so",
        calls=("vllm_config",),
    ),
    Hook(
        module=_MANAGER,
        name="FullAttentionManager",
        why="free blocks in the middle of a row",
        members=(
            "_null_block",
            "block_pool",
            "has_positionally_stable_blocks",
            "max_admission_blocks_per_request",
            "req_to_blocks",
            "supports_fine_grained_hash_lookup",
        ),
    ),
    Hook(
        module=_MANAGER,
        name="FullAttentionManager.__init__",
        why="switch caching off and cap what admission reserves",
        overrides=(
            "kv_cache_spec, block_pool, enable_caching, kv_cache_group_id, "
            "scheduler_block_size, dcp_world_size=, pcp_world_size=, "
            "needs_kv_cache_zeroing=, max_admission_blocks_per_request="
        ),
    ),
    Hook(
        module=_MANAGER,
        name="FullAttentionManager.remove_skipped_blocks",
        why="free the blocks that processed steps have evicted",
        overrides="request_id, processed_computed_tokens, num_prompt_tokens=",
    ),
    Hook(
        module=_MANAGER,
        name="FullAttentionManager.allocate_new_blocks",
        why="count the blocks that a request holds",
        overrides="request_id, num_tokens, num_tokens_main_model",
    ),
    Hook(
        module=_MANAGER,
        name="FullAttentionManager.pop_blocks_for_free",
        why="forget a request that ends",
        overrides="request_id",
    ),
    Hook(
        module=_MANAGER,
        name="FullAttentionManager.find_longest_cache_hit",
        why="take no prefix hits",
        overrides=(
            "block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, "
            "drop_eagle_block, alignment_tokens, dcp_world_size=, pcp_world_size="
        ),
    ),
    Hook(
        module=_MANAGER,
        name="FullAttentionManager.cache_blocks",
        why="hash no block, since its content may be overwritten",
        overrides="request, num_tokens, retention_interval=, *, replay_boundaries",
    ),
    Hook(
        module="vllm.v1.core.kv_cache_utils",
        name="BlockHashList",
        why="name what prefix-cache lookups are given",
    ),
    Hook(
        module="vllm.v1.core.block_pool",
        name="BlockPool.free_blocks",
        why="give evicted blocks back",
        calls=("ordered_blocks",),
    ),
    Hook(
        module="vllm.v1.core.kv_cache_utils",
        name="KVCacheBlock",
        why="tell null blocks from held ones",
        members=("block_id", "is_null"),
    ),
)

_VERIFYING = (
    Hook(
        module="vllm",
        name="SamplingParams",
        why="say how the tiny engine generates",
    ),
    Hook(
        module="vllm.inputs",
        name="TokensPrompt",
        why="give the tiny engine its prompts",
    ),
    Hook(
        module="vllm.plugins",
        name="load_general_plugins",
        why="check that the plugin is found",
        calls=(),
    ),
)

_SCHEDULING = (
    Hook(
        module=_SCHEDULER,
        name="Scheduler",
        why="reach the block managers and the running requests",
        members=("current_step", "kv_cache_manager", "requests"),
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.__init__",
        why="read the options",
        overrides=(
            "vllm_config, kv_cache_config, structured_output_manager, block_size, "
            "hash_block_size=, mm_registry=, include_finished_set=, log_stats="
        ),
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler._reserve_prefill_lookahead",
        why="end a prompt chunk at a multiple of the option `chunk`",
        overrides="request, num_computed_tokens, num_new_tokens",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.add_request",
        why="refuse requests whose length goes back",
        overrides="request",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.finish_requests",
        why="forget refused requests",
        calls=("request_ids", "finished_status"),
        overrides="request_ids, finished_status",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.schedule",
        why="publish and trace what requests hold",
        overrides="throttle_prefills=",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.update_from_output",
        why="answer refused requests",
        overrides="scheduler_output, model_runner_output",
    ),
    Hook(
        module=_SCHEDULER,
        name="Scheduler.shutdown",
        why="remove the published numbers",
        overrides="",
    ),
    Hook(
        module="vllm.v1.core.sched.async_scheduler",
        name="AsyncScheduler",
        why="cut prompts into chunks under asynchronous scheduling",
        members=("_reserve_prefill_lookahead",),
    ),
    Hook(
        module="vllm.v1.core.kv_cache_manager",
        name="KVCacheManager",
        why="reach the block managers",
        members=("coordinator",),
    ),
    Hook(
        module="vllm.v1.core.kv_cache_coordinator",
        name="KVCacheCoordinator",
        why="reach the block managers",
        members=("single_type_managers",),
    ),
    Hook(
        module=_SPEC,
        name="KVCacheConfig",
        why="hand it to vLLM's scheduler",
    ),
    Hook(
        module="vllm.v1.core.sched.output",
        name="SchedulerOutput",
        why="trace the requests of a step",
        members=("num_scheduled_tokens",),
    ),
    Hook(
        module="vllm.v1.outputs",
        name="ModelRunnerOutput",
        why="hand it to vLLM's scheduler",
    ),
    Hook(
        module="vllm.v1.request",
        name="Request",
        why="tell a decode from a prompt, and refuse what cannot be served",
        members=(
            "client_index",
            "get_finished_reason",
            "has_encoder_inputs",
            "num_computed_tokens",
            "num_output_placeholders",
            "num_prompt_tokens",
            "num_tokens",
            "request_id",
            "resumable",
            "sampling_params",
        ),
    ),
    Hook(
        module="vllm.v1.request",
        name="RequestStatus",
        why="end a refused request",
        members=("FINISHED_ERROR",),
    ),
    Hook(
        module="vllm.v1.engine",
        name="EngineCoreOutput",
        why="answer a refused request",
        members=("finish_reason", "new_token_ids", "request_id"),
    ),
    Hook(
        module="vllm.v1.engine",
        name="EngineCoreOutputs",
        why="answer a refused request",
        members=("outputs",),
    ),
)

_METRICS = (
    Hook(
        module="vllm",
        name="LLM",
        why="find the numbers of its engine",
        members=("llm_engine",),
    ),
    Hook(
        module="vllm.v1.engine.llm_engine",
        name="LLMEngine",
        why="find the numbers of an engine",
        members=("vllm_config",),
    ),
    Hook(
        module="vllm.v1.engine.async_llm",
        name="AsyncLLM",
        why="find the numbers of an engine",
        members=("vllm_config",),
    ),
)

_PLATFORMS = (
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

HOOKS = (
    *_NAMING,
    *_CONFIGURATION,
    *_ATTENTION,
    *_KV_CACHE,
    *_SCHEDULING,
    *_METRICS,
    *_VERIFYING,
    *_PLATFORMS,
)
