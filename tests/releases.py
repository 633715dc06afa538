# SPDX-License-Identifier: Apache-2.0
"""The tested vLLM releases, for tests that read or run the Python files of each."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tools.releases import installed_release, need_release


def release_path(version: str) -> Path:
    """Return the folder to put on the path for a release, or skip the test.

    In CI, which has to test every release, a missing one is a failure.
    """
    if version == installed_release():
        spec = importlib.util.find_spec("vllm")
        assert spec is not None and spec.origin is not None
        return Path(spec.origin).parents[1]
    try:
        return need_release(version)
    except FileNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
