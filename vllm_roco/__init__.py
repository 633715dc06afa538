# SPDX-License-Identifier: Apache-2.0
"""A vLLM attention backend that keeps a budget of KV cache tokens per sequence.

    vllm serve MODEL --attention-backend roco \
        --additional-config '{"roco": {"budget": 2048, "stride": 256}}'
"""

from __future__ import annotations

__version__ = "0.1.0"

BACKEND_PATH = "vllm_roco.attention.backend.RocoBackend"


def register() -> None:
    """Name the backend `ROCO` (entry point `vllm.general_plugins`).

    Called in every vLLM process, any number of times, whatever backend is chosen: it
    only adds a name and imports nothing heavy.

    Raises:
        ImportError: vLLM is older than any version that has the hooks.
    """
    from vllm.v1.attention.backends.registry import (
        AttentionBackendEnum,
        register_backend,
    )

    from vllm_roco import compat
    from vllm_roco.prometheus import register_collector

    compat.check_version()
    register_collector()
    if "ROCO" not in AttentionBackendEnum.__members__:
        register_backend("ROCO", BACKEND_PATH)
        compat.pickle_backend_by_name()
