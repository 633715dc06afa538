# SPDX-License-Identifier: Apache-2.0
"""A vLLM attention backend that keeps a budget of KV cache tokens per sequence.

    vllm serve MODEL --attention-backend roco \
        --additional-config '{"roco": {"budget": 2048, "stride": 256}}'
"""

from __future__ import annotations

import multiprocessing

__version__ = "0.1.0"

BACKEND_PATH = "vllm_roco.attention.selection.ROCO"
"""What vLLM asks about a layer when `ROCO` was named."""


def register() -> None:
    """Name the backend `ROCO` (entry point `vllm.general_plugins`).

    Called in every vLLM process, any number of times, whatever backend is chosen: it
    adds a name, and has requests checked that go to RoCo's layers. Where the platform
    would run its own attention under that name, nothing is done, so that choosing it is
    an error.

    Raises:
        ImportError: vLLM is older than any version that has the hooks.
    """
    from vllm.logger import init_logger
    from vllm.v1.attention.backends.registry import (
        AttentionBackendEnum,
        register_backend,
    )

    from vllm_roco import backend_name, compat
    from vllm_roco.front_end import check_requests
    from vllm_roco.observability.prometheus import register_collector

    compat.check_version()
    if (obstacle := _obstacle()) is not None:
        # once for the user, not again from every engine process
        if multiprocessing.parent_process() is None:
            init_logger(f"vllm.{__name__}").warning_once(
                "roco: --attention-backend roco cannot be chosen here: %s", obstacle
            )
        return
    register_collector()
    check_requests()
    if backend_name.BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(backend_name.BACKEND_NAME, BACKEND_PATH)
        backend_name.pickle_backend_by_name()


def _obstacle() -> str | None:
    """Return why vLLM's platform would ignore the choice of ROCO, None if it would not.

    CPU platforms and out-of-tree ones choose attention by themselves; the built-in
    platforms of accelerators honour the choice, or refuse it.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_out_of_tree()):
        return None
    name = type(current_platform).__qualname__
    if envs.VLLM_TARGET_DEVICE == "cpu":
        return (
            f"VLLM_TARGET_DEVICE = 'cpu' makes vLLM ignore platform plugins, and its "
            f"{name} runs its own attention whatever is chosen. Unset "
            "VLLM_TARGET_DEVICE; a CPU build of vLLM does not need it at run time."
        )
    if current_platform.is_cpu():
        from vllm_roco.cpu_platform import RocoCpuPlatform

        if isinstance(current_platform, RocoCpuPlatform):
            return None
    return (
        f"vLLM runs on the platform {name}, which chooses attention by itself. Leave "
        "the other platform plugin out with VLLM_PLUGINS=roco, or derive its class "
        "from vllm_roco.cpu_platform.RocoCpuPlatform."
    )
