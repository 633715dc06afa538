# SPDX-License-Identifier: Apache-2.0
"""What the demo's tests share: a port, and an environment to run it in."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture
def port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """This Python, and a folder of its own for temporary files."""
    # `tmp_path` is too long for the sockets in it
    with tempfile.TemporaryDirectory() as scratch:
        yield os.environ | {"ROCO_PYTHON": sys.executable, "TMPDIR": scratch}
