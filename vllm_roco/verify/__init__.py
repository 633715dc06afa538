# SPDX-License-Identifier: Apache-2.0
"""Checks an installation on the machine it runs on.

    python -m vllm_roco.verify

Prints a report to paste into an issue; the exit status is 0 if nothing failed. Nothing
is downloaded: what needs an engine runs a tiny model with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata

from typing_extensions import override

from vllm_roco.verify.engine import EngineChecks
from vllm_roco.verify.findings import Failed, Skipped

_ENVIRONMENT = {
    # the report is what is wanted; vLLM still tells of errors
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Result:
    """How a check ended.

    Attributes:
        name: Of the check.
        verdict: `"PASS"`, `"FAIL"` or `"SKIP"`.
        details: What was found, in one or more lines.
    """

    name: str
    verdict: str
    details: str

    @override
    def __str__(self) -> str:
        first, *others = self.details.splitlines() or [""]
        lines = [f"[{self.verdict}] {self.name}: {first}"]
        return "\n".join(lines + [f"       {line}" for line in others])


def check_versions() -> str:
    """Return the versions and the device; an untested vLLM is no failure."""
    import torch
    from vllm.platforms import current_platform

    from vllm_roco import compat

    compat.check_version()
    version = compat.installed_version()
    tested = version is not None and version.public in compat.TESTED_VLLM
    device = current_platform.device_name
    if current_platform.is_cuda():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        device = (
            f"{torch.cuda.get_device_name()} ({memory:.0f} GiB, capability "
            f"{capability}, CUDA {torch.version.cuda})"
        )
    installed = [
        f"{name} {_version_of(name)}"
        for name in ("vllm-roco", "torch", "triton", "transformers", "xformers")
    ]
    return (
        f"vLLM {version} ({'tested' if tested else 'not tested'}), "
        f"{', '.join(installed)}\n"
        f"Python {platform.python_version()} on {platform.platform()}, device {device}"
    )


def check_hooks() -> str:
    """Look for what the plugin imports, calls and overrides of the installed vLLM."""
    from vllm_roco.hooks import hooks

    found = hooks()
    if missing := [str(hook) for hook in found if hook.trouble]:
        raise Failed("\n".join(missing))
    return f"all {len(found)} of this platform are there"


def check_registration() -> str:
    """Load vLLM's plugins as vLLM does, and look for the backend."""
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    member = AttentionBackendEnum.__members__.get("ROCO")
    if member is None:
        raise Failed(
            "vLLM does not know ROCO. Install the package in the environment of vLLM, "
            f"and see that VLLM_PLUGINS ({os.environ.get('VLLM_PLUGINS')!r}) does not "
            "leave `roco` out; vLLM's log tells of whatever else stands in the way."
        )
    backend = member.get_class()
    where = type(current_platform).__qualname__
    return f"{member.name} is {backend.get_impl_cls().__qualname__} on {where}"


def check_kernels() -> str:
    """Run the Triton kernels on the GPU and compare them with PyTorch."""
    import torch

    if not torch.cuda.is_available():
        raise Skipped(
            "no CUDA device, and the CPU implementation has no kernels of its own"
        )
    from vllm_roco.kernel_check import CHECKS

    device = torch.device("cuda")
    failures = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, check in CHECKS.items():
            torch.manual_seed(0)
            try:
                check(device, dtype)
            except AssertionError as error:
                failures.append(f"{name}, {dtype}: {error}")
    if failures:
        raise Failed("\n".join(failures))
    return f"{', '.join(CHECKS)} agree with PyTorch in bfloat16 and float32"


_ENGINE = EngineChecks()

CHECKS: dict[str, Callable[[], str]] = {
    "versions": check_versions,
    "hooks": check_hooks,
    "registration": check_registration,
    "kernels": check_kernels,
    "engine": _ENGINE.check_steps,
    "prefixes": _ENGINE.check_prefixes,
}


def run(name: str) -> Result:
    """Run one check, whatever it raises."""
    try:
        return Result(name, "PASS", CHECKS[name]())
    except Skipped as reason:
        return Result(name, "SKIP", str(reason))
    except Failed as finding:
        return Result(name, "FAIL", str(finding))
    # a broken installation may raise anything, which is what the report is for
    except Exception as error:
        return Result(
            name,
            "FAIL",
            f"{type(error).__name__}: {error}\n{traceback.format_exc().rstrip()}",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and write the report.

    Args:
        arguments: Of the command line.

    Returns:
        The exit status, 0 if no check failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vllm_roco.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CHECKS,
        default=list(CHECKS),
        metavar="CHECK",
        help=f"run these checks only: {', '.join(CHECKS)}",
    )
    chosen = parser.parse_args(arguments).only
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    failed = False
    with contextlib.closing(_ENGINE):
        for name in dict.fromkeys(chosen):
            result = run(name)
            failed |= result.verdict == "FAIL"
            sys.stdout.write(f"{result}\n")
            sys.stdout.flush()
    sys.stdout.write(f"vllm_roco.verify: {'FAIL' if failed else 'PASS'}\n")
    return int(failed)


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"
