# SPDX-License-Identifier: Apache-2.0
"""Memory that is lost where layers of several kinds share pages of one size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import AttentionSpec

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

MAX_PADDING = 0.02
"""Share of a page that nobody is told of. Statistics take up to 1 %, which pads the
pages of layers without them by as much."""


def padding_trouble(kv_cache_config: KVCacheConfig) -> str | None:
    """Return which layers' pages have more padding than that, None if none have.

    vLLM makes the pages of all groups equal: by larger blocks, where one page holds
    another a whole number of times, else by padding.
    """
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if not isinstance(spec, AttentionSpec):
            continue
        used, page = spec.unpadded_page_size_bytes, spec.page_size_bytes
        if page > (1 + MAX_PADDING) * used:
            return (
                f"roco: {len(group.layer_names)} layers with a {type(spec).__name__} "
                f"and blocks of {spec.block_size} tokens use {used} bytes of pages of "
                f"{page} bytes; the rest of the memory is lost. On a CPU leave "
                "--block-size out, or use 32; elsewhere the model's kinds of layers "
                "have keys and values of unlike sizes."
            )
    return None
