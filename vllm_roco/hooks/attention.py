# SPDX-License-Identifier: Apache-2.0
"""Attention backends, their layers and kernels, as vLLM has them."""

from __future__ import annotations

from vllm_roco.hook_check import Hook

_BACKEND = "vllm.v1.attention.backend"
_SPEC = "vllm.v1.kv_cache_interface"

ATTENTION = (
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
        members=(
            "attn_backend",
            "get_kv_cache_spec",
            "impl",
            "kv_cache",
            "layer_name",
            "num_heads",
        ),
    ),
    Hook(
        module="vllm.model_executor.models.utils",
        name="extract_layer_index",
        why="know the last layer of a group, which evicts for all of them",
        calls=("layer_name",),
    ),
)
