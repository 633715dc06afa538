# SPDX-License-Identifier: Apache-2.0
"""The start-up check of vLLM's version."""

from __future__ import annotations

import logging
import logging.handlers
from collections.abc import Iterator

import pytest
from packaging.version import Version

from vllm_roco import compat


@pytest.fixture
def vllm_log() -> Iterator[list[logging.LogRecord]]:
    """What vLLM logs; its logger may or may not propagate to pytest's handler."""
    handler = logging.handlers.BufferingHandler(capacity=100)
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    yield handler.buffer
    logger.removeHandler(handler)


@pytest.mark.parametrize("version", ["0.26.0", "0.31.9", "0.32.0rc1", "0.32.0.dev7"])
def test_an_older_release_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(ImportError, match=rf"vLLM {version} .*0\.32\.0 or newer"):
        compat.check_version()


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.32.0+cpu", "0.33.0+cu129"])
def test_a_tested_release_is_silent(
    version: str, monkeypatch: pytest.MonkeyPatch, vllm_log: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    compat.check_version()
    assert vllm_log == []


@pytest.mark.parametrize("version", ["0.32.1", "0.33.0rc1", "0.33.1.dev5+gabc", "1.0"])
def test_an_untested_release_is_warned_of_once(
    version: str, monkeypatch: pytest.MonkeyPatch, vllm_log: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    compat.check_version()
    compat.check_version()
    (record,) = vllm_log
    message = record.getMessage()
    assert f"vLLM {Version(version)} was not tested" in message
    assert "0.32.0 and 0.33.0 were" in message
    assert "python -m vllm_roco.verify" in message


def test_a_source_tree_without_a_version_asks_its_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = compat.installed_version()
    assert installed is not None
    monkeypatch.setattr("vllm.__version__", "dev")
    asked = compat.installed_version()
    # on a CPU, the distribution's version may tell so: 0.32.0+cpu
    assert asked is not None and asked.base_version == installed.base_version
