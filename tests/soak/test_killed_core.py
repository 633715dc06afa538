# SPDX-License-Identifier: Apache-2.0
"""Processes that are killed or fail: errors for clients, nothing left for the next."""

from __future__ import annotations

import tempfile
from pathlib import Path

import httpx
import pytest

from tests.every_form import only_with_every_form
from tests.serving.server import ASK, Server, eventually
from tests.soak.engines import ROOT, Host
from tests.soak.failing_worker import CAUSE
from tests.soak.killed_core import Last, run
from tests.soak.setups import MODEL_NAME

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_clients_get_errors_a_restart_starts_anew_and_a_failed_eviction_ends_it(
    engine_lock: None, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server behind the killed one has a worker that fails while it evicts."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    last = Last(["--worker-cls=tests.soak.failing_worker.FailingWorker"], fails)
    # sockets have short names
    with tempfile.TemporaryDirectory(prefix="k-") as folder:
        assert run(Host(folder=tmp_path), [2.0], Path(folder), last=last) == []


@only_with_every_form
@pytest.mark.parametrize(
    "ranks", [{"tensor": 2}, {"pipeline": 2}], ids=["tensor", "pipeline"]
)
def test_the_same_beside_a_core_that_lives(
    ranks: dict[str, int], engine_lock: None, smollm2: Path, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="k-") as folder:
        assert run(Host(folder=tmp_path, **ranks), [2.0], Path(folder), rank=1) == []


def fails(server: Server) -> None:
    """Let a worker fail, which takes its engine with it, and says why in the log."""
    body = {"model": MODEL_NAME, "prompt": [1000] * 40, "ignore_eos": True}

    def ask(max_tokens: int) -> httpx.Response:
        return httpx.post(
            f"{server.url}/v1/completions",
            json=body | {"max_tokens": max_tokens},
            timeout=60,
            **ASK,
        )

    def is_dead() -> bool:
        try:
            return not server.is_healthy()
        except httpx.TransportError:
            return True

    def is_told() -> bool:
        return f"RuntimeError: {CAUSE}" in server.log.read_text()

    assert ask(8).status_code == 200
    answer = ask(400)
    assert answer.status_code == 500
    assert "Traceback" not in answer.text and CAUSE not in answer.text
    assert eventually(is_dead, 60)
    assert eventually(is_told, 60)
