# SPDX-License-Identifier: Apache-2.0
"""The CPU platform that honours `--attention-backend roco`.

vLLM's CPU platform runs its own attention whatever backend is chosen, so on CPU builds
the plugin brings an out-of-tree platform (entry point `vllm.platform_plugins`). It is
the stock platform in everything else. Imports nothing of vLLM before it is asked to.
"""

from __future__ import annotations


def activate() -> str | None:
    """Return the platform class on a CPU build of vLLM, None elsewhere."""
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    return "vllm_roco.cpu_platform.RocoCpuPlatform"
