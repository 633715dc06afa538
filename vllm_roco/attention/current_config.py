# SPDX-License-Identifier: Apache-2.0
"""The configuration of a worker process, for hooks that vLLM calls without one.

`AttentionBackend.customize_spec` runs in the worker outside `set_current_vllm_config`,
but always after the layers were built inside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_remembered: VllmConfig | None = None


def remember_vllm_config() -> VllmConfig:
    """Return the current configuration and keep it; for a layer being built."""
    global _remembered
    _remembered = get_current_vllm_config()
    return _remembered


def current_vllm_config() -> VllmConfig:
    """Return the current configuration, or the one the newest layer was built under.

    Raises:
        RuntimeError: There is neither.
    """
    config = get_current_vllm_config_or_none() or _remembered
    if config is None:
        raise RuntimeError("roco: vLLM asked for a cache spec before it built a layer")
    return config
