# SPDX-License-Identifier: Apache-2.0
"""Every place where the plugin leans on vLLM, as data.

vLLM promises none of these names. Each is listed once, with what is needed of it and
why, so that a release can be checked without running it: the installed one by
`vllm_roco.compat`, any other one by `tools/check_vllm.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One name of vLLM and what the plugin needs of it.

    Attributes:
        module: Dotted name of the module that the plugin imports it from.
        name: Dotted name within the module, empty for the module itself.
        why: What the plugin does with it.
        calls: Names of the arguments that the plugin passes. The function must take
            them, and must need no other.
        overrides: The whole signature, as `spell_signature` writes it, where the plugin
            puts its own function in vLLM's place or vLLM calls one of the plugin's.
        members: Attributes, fields or methods that are read.
        platform: `"cpu"` or `"cuda"` where only that platform's part needs it.
    """

    module: str
    name: str
    why: str
    calls: tuple[str, ...] | None = None
    overrides: str | None = None
    members: tuple[str, ...] = ()
    platform: str | None = None

    @property
    def label(self) -> str:
        """The full dotted name."""
        return f"{self.module}.{self.name}" if self.name else self.module


@dataclass(frozen=True)
class Symbol:
    """What a release has under a name.

    Attributes:
        parameters: The signature of a function as `spell_signature` writes it; None if
            it is something else.
        members: The attributes of a class and of its instances, or of a module.
    """

    parameters: str | None
    members: frozenset[str]


class Release(Protocol):
    """A release of vLLM that can be asked what it has."""

    def find(self, module: str, name: str) -> Symbol:
        """Return what a module's name stands for; LookupError if there is nothing."""


def complaints(hook: Hook, release: Release) -> Iterator[str]:
    """Yield a sentence for everything that a release does not have as a hook needs."""
    try:
        symbol = release.find(hook.module, hook.name)
    except LookupError as error:
        yield f"{hook.label} is missing: {error.args[0]}. Needed to {hook.why}."
        return
    lost = [member for member in hook.members if member not in symbol.members]
    if lost:
        yield f"{hook.label} has no {', '.join(lost)}. Needed to {hook.why}."
    if hook.overrides is not None and hook.overrides != symbol.parameters:
        yield (
            f"{hook.label} takes ({symbol.parameters}), not ({hook.overrides}). "
            f"Overridden to {hook.why}."
        )
    if hook.calls is not None:
        yield from _call_complaints(hook, hook.calls, symbol.parameters)


def spell_signature(parameters: Iterable[tuple[str, Any, bool]]) -> str:
    """Write a signature without types and values, such as `a, b=, *, c, **rest`.

    Args:
        parameters: Name, `inspect.Parameter` kind and whether there is a default, of
            each parameter.
    """
    spelled: list[str] = []
    keyword_only = False
    for name, kind, has_default in parameters:
        if kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            spelled.append("*")
        if kind is inspect.Parameter.VAR_POSITIONAL:
            keyword_only = True
            name = f"*{name}"
        elif kind is inspect.Parameter.VAR_KEYWORD:
            name = f"**{name}"
        spelled.append(f"{name}=" if has_default else name)
    return ", ".join(spelled)


def _call_complaints(
    hook: Hook, passed: tuple[str, ...], parameters: str | None
) -> Iterator[str]:
    """Yield what speaks against calling a function with the given arguments."""
    if parameters is None:
        yield f"{hook.label} is not a function. Called to {hook.why}."
        return
    taken = [name for name in parameters.split(", ") if name and name != "*"]
    names = [name.removesuffix("=") for name in taken if not name.startswith("*")]
    swallows = any(name.startswith("**") for name in taken)
    unknown = [name for name in passed if name not in names and not swallows]
    needed = [
        name
        for name in taken
        if not name.startswith("*") and not name.endswith("=") and name not in passed
    ]
    if unknown:
        yield (
            f"{hook.label} takes ({parameters}), without {', '.join(unknown)}. "
            f"Called to {hook.why}."
        )
    if needed:
        yield (
            f"{hook.label} takes ({parameters}) and now needs {', '.join(needed)}. "
            f"Called to {hook.why}."
        )


_REGISTRY = "vllm.v1.attention.backends.registry"
_BACKEND = "vllm.v1.attention.backend"
_SPEC = "vllm.v1.kv_cache_interface"
_SPEC_REGISTRY = "vllm.v1.kv_cache_spec_registry"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"
_CPU = "vllm.platforms.cpu"

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
        why="find the member that was registered, and pickle it by name",
        members=("register", "get_class", "get_path", "is_overridden", "CPU_ATTN"),
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
        name="VllmConfig",
        why="read the options, and refuse what does not go together with a budget",
        members=(
            "additional_config",
            "attention_config",
            "cache_config",
            "compilation_config",
            "instance_id",
            "kv_transfer_config",
            "max_concurrent_batches",
            "max_in_flight_tokens",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
        ),
    ),
    Hook(
        module="vllm.config",
        name="SchedulerConfig",
        why="put the scheduler in place that cuts prompts into chunks",
        members=(
            "async_scheduling",
            "enable_chunked_prefill",
            "long_prefill_token_threshold",
            "max_num_batched_tokens",
            "max_num_seqs",
            "scheduler_cls",
        ),
    ),
    Hook(
        module="vllm.config",
        name="CacheConfig",
        why="know the block size and the cache's dtype",
        members=("block_size", "cache_dtype", "enable_prefix_caching"),
    ),
    Hook(
        module="vllm.config",
        name="ModelConfig",
        why="bound the memory of one sequence, and refuse hybrid models",
        members=("max_model_len", "is_hybrid", "dtype"),
    ),
    Hook(
        module="vllm.config",
        name="ParallelConfig",
        why="refuse context parallelism and micro-batches",
        members=(
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
            "use_ubatching",
        ),
    ),
    Hook(
        module="vllm.config",
        name="CompilationConfig",
        why="find the last layer of a group, which evicts for all of them",
        members=("static_forward_context",),
    ),
)

_ATTENTION = (
    Hook(
        module=_BACKEND,
        name="AttentionBackend",
        why="say what the backend can do, so that vLLM refuses the rest",
        members=(
            "forward_includes_kv_cache_update",
            "get_builder_cls",
            "get_impl_cls",
            "get_name",
            "get_supported_head_sizes",
            "supported_dtypes",
            "supported_kv_cache_dtypes",
            "supports_attn_type",
            "supports_kv_connector",
            "supports_sink",
            "supports_sliding_window",
            "validate_configuration",
        ),
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
        module=_SPEC,
        name="KVCacheLayout",
        why="name the layouts whose pages are contiguous",
        members=("LBHNC", "LBNHC"),
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
        members=("NEVER", "UNIFORM_SINGLE_TOKEN_DECODE"),
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
        members=(
            "_cudagraph_support",
            "device",
            "kv_cache_spec",
            "layer_names",
            "vllm_config",
        ),
    ),
    Hook(
        module=_BACKEND,
        name="AttentionMetadataBuilder.__init__",
        why="allocate those buffers once",
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
        name="AttentionImpl.__init__",
        why="refuse what the kernels cannot do",
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
    Hook(
        module="vllm.model_executor.layers.attention",
        name="Attention",
        why="reach the caches of all layers of a group",
        members=("impl", "kv_cache", "layer_name", "get_kv_cache_spec"),
    ),
)

_KV_CACHE = (
    Hook(
        module=_SPEC,
        name="AttentionSpec",
        why="add the statistics to the page",
        members=(
            "block_size",
            "dtype",
            "head_size",
            "num_kv_heads",
            "page_size_bytes",
            "page_size_padded",
            "unpadded_page_size_bytes",
        ),
    ),
    Hook(
        module=_SPEC,
        name="FullAttentionSpec",
        why="recognise the layers that get a budget",
        members=("block_size", "sliding_window", "attention_chunk_size"),
    ),
    Hook(
        module=_SPEC,
        name="KVCacheSpec.max_memory_usage_bytes",
        why="tell the truth about the memory of one sequence",
        overrides="vllm_config",
    ),
    Hook(
        module=_SPEC,
        name="KVCacheSpec.merge",
        why="keep the budget when layers become one group",
        overrides="specs",
    ),
    Hook(
        module=_SPEC,
        name="KVCacheSpec.is_uniform_with_collection",
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
        why="register vLLM's own specs before ours, which vLLM would then skip",
        calls=("vllm_config",),
    ),
    Hook(
        module=_MANAGER,
        name="FullAttentionManager",
        why="free blocks in the middle of a row",
        members=(
            "_null_block",
            "block_pool",
            "block_size",
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

_SCHEDULER = (
    Hook(
        module="vllm.v1.core.sched.scheduler",
        name="Scheduler",
        why="cut prompts into chunks",
        members=("schedule",),
    ),
    Hook(
        module="vllm.v1.core.sched.scheduler",
        name="Scheduler._reserve_prefill_lookahead",
        why="end a prompt chunk at a multiple of the option `chunk`",
        overrides="request, num_computed_tokens, num_new_tokens",
    ),
    Hook(
        module="vllm.v1.core.sched.async_scheduler",
        name="AsyncScheduler",
        why="cut prompts into chunks under asynchronous scheduling",
        members=("_reserve_prefill_lookahead",),
    ),
    Hook(
        module="vllm.v1.request",
        name="Request",
        why="tell a decode from a prompt, and a resumed request from a new one",
        members=(
            "num_computed_tokens",
            "num_in_flight_tokens",
            "num_output_placeholders",
            "num_prompt_tokens",
            "num_tokens",
            "request_id",
            "resumable",
        ),
    ),
)

_METRICS = (
    Hook(
        module="vllm.v1.metrics.loggers",
        name="StatLoggerBase.__init__",
        why="start the metrics of an engine",
        overrides="vllm_config, engine_index=",
    ),
    Hook(
        module="vllm.v1.metrics.loggers",
        name="StatLoggerBase.record",
        why="count what was evicted",
        overrides=("scheduler_stats, iteration_stats, mm_cache_stats=, engine_idx="),
    ),
    Hook(
        module="vllm.v1.metrics.loggers",
        name="StatLoggerBase.log_engine_initialized",
        why="satisfy the interface",
        overrides="",
    ),
)

_PLATFORMS = (
    Hook(
        module="vllm.platforms",
        name="cpu_platform_plugin",
        why="leave every platform but a CPU build alone",
        calls=(),
    ),
    Hook(
        module="vllm.platforms",
        name="current_platform",
        why="know which implementation to use",
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
        why="put the scheduler in place on the CPU build",
        overrides="vllm_config",
        platform="cpu",
    ),
)

HOOKS = (
    *_NAMING,
    *_CONFIGURATION,
    *_ATTENTION,
    *_KV_CACHE,
    *_SCHEDULER,
    *_METRICS,
    *_PLATFORMS,
)
