# SPDX-License-Identifier: Apache-2.0
"""The attention backend's name, and how it reaches processes without plugins.

The module is imported by `register()` in every process of vLLM, and where a name is
unpickled, so it imports nothing of vLLM until a function is called.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND_NAME = "ROCO"
"""Name of the attention backend, `--attention-backend roco`."""


def pickle_backend_by_name() -> None:
    """Let the backend's enum member reach processes that have not loaded plugins yet.

    An enum member pickles as its value, which means nothing to a spawned process that
    unpickles its `VllmConfig` before vLLM loads the plugins there. The plugin's own
    member is therefore pickled by name, through a function whose import registers it.
    Every other member is pickled as before.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    before = copyreg.dispatch_table.get(AttentionBackendEnum)
    if not isinstance(before, _ReduceBackend):
        copyreg.pickle(AttentionBackendEnum, _ReduceBackend(before))


class _ReduceBackend:
    """How a member of vLLM's enum is pickled, see `pickle_backend_by_name`."""

    def __init__(self, before: Callable[[Any], Any] | None) -> None:
        self._before = before

    def __call__(self, member: AttentionBackendEnum) -> Any:
        if member.name == BACKEND_NAME:
            return restore_backend, (member.name,)
        if self._before is not None:
            return self._before(member)
        # enum ignores the protocol, and copyreg does not tell it
        return member.__reduce_ex__(pickle.DEFAULT_PROTOCOL)


def restore_backend(name: str) -> AttentionBackendEnum:
    """Return the backend's enum member in a process that unpickles it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    import vllm_roco

    vllm_roco.register()
    return AttentionBackendEnum[name]
