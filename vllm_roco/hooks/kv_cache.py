# SPDX-License-Identifier: Apache-2.0
"""KV cache specs and block managers of vLLM."""

from __future__ import annotations

from vllm_roco.hook_check import Hook

_SPEC = "vllm.v1.kv_cache_interface"
_SPEC_REGISTRY = "vllm.v1.kv_cache_spec_registry"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager"

KV_CACHE = (
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
            "num_heads",
            "num_kv_heads",
            "page_size_bytes",
            "page_size_padded",
            "state_content_size_bytes",
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
        name="KVCacheSpec.get_num_kernel_states",
        why="show a page as one cell of bytes, so that copies take all of it",
        overrides="kernel_block_size",
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
        name="FullAttentionManager.get_num_blocks_to_allocate",
        why="let no request in that evicting ones have no room for",
        overrides=(
            "request_id, num_tokens, new_computed_blocks, total_computed_tokens, "
            "num_local_computed_tokens, num_tokens_main_model, apply_admission_cap=, "
            "prefill_end="
        ),
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
        why="take no prefix hits by block",
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
        module=_MANAGER,
        name="FullAttentionManager.add_local_computed_blocks",
        why="hold the blocks of a snapshot until they are copied",
        overrides=(
            "request_id, new_computed_blocks, num_local_computed_tokens, "
            "num_external_computed_tokens"
        ),
    ),
    Hook(
        module=_MANAGER,
        name="FullAttentionManager._apply_cow",
        why="begin with copies of a snapshot's blocks",
        calls=("request_id", "block_idx", "source_block", "cow_block"),
    ),
    Hook(
        module=_MANAGER,
        name="FullAttentionManager.take_pending_cow_copies",
        why="make snapshots when all requests of a step are chosen",
        overrides="",
    ),
    Hook(
        module=_MANAGER,
        name="FullAttentionManager._get_num_evictable_blocks",
        why="count the blocks of a snapshot that are in the free queue",
        calls=("blocks",),
    ),
    Hook(
        module="vllm.v1.core.kv_cache_utils",
        name="BlockHash",
        why="know a prefix by vLLM's own hash",
    ),
    Hook(
        module="vllm.v1.core.kv_cache_utils",
        name="BlockHashWithGroupId",
        why="mark the blocks of a snapshot",
    ),
    Hook(
        module="vllm.v1.core.kv_cache_utils",
        name="make_block_hash_with_group_id",
        why="mark the blocks of a snapshot",
        calls=("block_hash", "group_id"),
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
        why="tell null blocks from held ones, and mark those of a snapshot",
        members=("block_hash", "block_id", "is_null", "ref_cnt", "set_block_hash"),
    ),
    Hook(
        module="vllm.v1.core.block_pool",
        name="BlockPool",
        why="keep snapshots in the free queue",
        members=("get_num_free_blocks", "null_block", "num_gpu_blocks"),
    ),
    Hook(
        module="vllm.v1.core.block_pool",
        name="BlockPool.get_new_blocks",
        why="take the blocks of a snapshot",
        calls=("num_blocks",),
    ),
    Hook(
        module="vllm.v1.core.block_pool",
        name="BlockPool.touch",
        why="hold blocks until they are copied",
        calls=("blocks",),
    ),
)
