# SPDX-License-Identifier: Apache-2.0
"""Block managers in vLLM's real cache manager, and requests that fill them."""

from __future__ import annotations

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from tests.kv_cache.specs import one_group, roco_spec
from vllm_roco.kv_cache.manager import RocoManager

BLOCK = 16
BUDGET_BLOCKS = 4
STRIDE_BLOCKS = 2
NUM_BLOCKS = 65

init_none_hash(sha256)


def cache_manager(
    plan: KVCacheConfig | None = None, enable_caching: bool = False
) -> KVCacheManager:
    """Return vLLM's cache manager for 64 usable blocks of 16 tokens.

    By default a step may have any length, so that few of them reach any place.
    """
    cache = KVCacheManager(
        plan or one_group(roco_spec(chunk=1 << 20), NUM_BLOCKS),
        max_model_len=1 << 20,
        max_in_flight_tokens=1 << 20,
        enable_caching=enable_caching,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
    )
    roco_manager(cache).scheduler_ends_chunks = True
    return cache


def roco_manager(cache: KVCacheManager) -> RocoManager:
    (manager, *_) = cache.coordinator.single_type_managers
    assert isinstance(manager, RocoManager)
    return manager


def request(request_id: str = "a", num_tokens: int = 1 << 12) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=[1] * num_tokens,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def run(
    cache: KVCacheManager, sequence: Request, num_tokens: int, in_flight: int = 0
) -> bool:
    """Allocate a step as the scheduler does, and count it as computed.

    Returns:
        Whether the pool had room.
    """
    sequence.num_in_flight_tokens = in_flight
    if cache.allocate_slots(sequence, num_tokens) is None:
        return False
    sequence.num_computed_tokens += num_tokens
    return True
