# SPDX-License-Identifier: Apache-2.0
"""What the demo's tests share: a port, and an environment to run it in."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest


@pytest.fixture
def port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """This Python, and a folder of its own for temporary files."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return os.environ | {
        "ROCO_PYTHON": sys.executable,
        "TMPDIR": str(scratch),
        "COLUMNS": "160",
    }
