# SPDX-License-Identifier: Apache-2.0
"""The CPU platform that honours `--attention-backend roco`.

vLLM's CPU platform runs its own attention whatever backend is chosen, so on CPU builds
the plugin brings an out-of-tree platform (entry point `vllm.platform_plugins`). It is
the stock platform in everything else. Imports nothing of vLLM before it is asked to.
"""

from __future__ import annotations

from importlib.metadata import entry_points

GROUP = "vllm.platform_plugins"


def activate() -> str | None:
    """Return the platform class on a CPU build of vLLM, None elsewhere.

    vLLM does not start with two out-of-tree platforms, so this one steps aside for any
    other; `vllm_roco.register` then says that ROCO cannot be chosen.
    """
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None or _another_is_active():
        return None
    return "vllm_roco.cpu_platform.RocoCpuPlatform"


def _another_is_active() -> bool:
    from vllm import envs

    for plugin in entry_points(group=GROUP):
        allowed = envs.VLLM_PLUGINS is None or plugin.name in envs.VLLM_PLUGINS
        if not allowed or plugin.module == __name__:
            continue
        try:
            if plugin.load()() is not None:
                return True
        # vLLM takes a plugin that fails for one that is not active
        except Exception:
            continue
    return False
