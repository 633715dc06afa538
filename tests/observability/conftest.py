# SPDX-License-Identifier: Apache-2.0
"""Places for files of numbers that no other test sees, and what is warned of."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_roco.observability.warning import logger


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test, and the processes it starts, a temporary directory and a cache.

    Yields:
        Where the files are to be, unless that is taken.
    """
    # not pytest's own, in which the names of vLLM's sockets would be too long
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
        yield Path(temporary, f"vllm_roco-{os.geteuid()}")


class Warnings(logging.Handler):
    """What the package has warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it; vLLM's log may or may not propagate to pytest's handler."""
        self.messages.append(record.getMessage())


@pytest.fixture
def warnings() -> Iterator[Warnings]:
    handler = Warnings()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
