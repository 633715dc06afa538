# SPDX-License-Identifier: Apache-2.0
"""A worker that fails while it evicts takes its engine with it, and says why."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.serving.server import ASK, eventually, running_server
from tests.soak.engines import ROOT, Host
from tests.soak.failing_worker import CAUSE
from tests.soak.setups import MODEL_NAME, as_flags


@pytest.mark.engine
@pytest.mark.slow
def test_a_failed_eviction_ends_the_engine_with_its_cause_in_the_log(
    engine_lock: None, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    host = Host(folder=tmp_path)
    arguments = host.arguments()
    del arguments["scheduler_cls"]
    arguments["worker_cls"] = "tests.soak.failing_worker.FailingWorker"
    flags = [*as_flags(arguments), "--served-model-name", MODEL_NAME]
    body = {"model": MODEL_NAME, "prompt": [1000] * 40, "ignore_eos": True}
    with running_server(host.find_model(), flags, tmp_path / "log.txt") as server:

        def ask(max_tokens: int) -> httpx.Response:
            return httpx.post(
                f"{server.url}/v1/completions",
                json=body | {"max_tokens": max_tokens},
                timeout=60,
                **ASK,
            )

        assert ask(8).status_code == 200
        answer = ask(400)
        assert answer.status_code == 500
        assert "Traceback" not in answer.text and CAUSE not in answer.text

        def is_dead() -> bool:
            try:
                return not server.is_healthy()
            except httpx.TransportError:
                return True

        assert eventually(is_dead, 60)
    log = (tmp_path / "log.txt").read_text()
    assert f"RuntimeError: {CAUSE}" in log
