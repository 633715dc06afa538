# SPDX-License-Identifier: Apache-2.0
"""The report of `python -m vllm_roco.verify`."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.engine.engines import engines_in_process
from vllm_roco import verify
from vllm_roco.scheduler import RocoSchedulerMixin


def run_verify(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_roco.verify", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.engine
@pytest.mark.usefixtures("engine_lock")
def test_a_sound_installation_passes() -> None:
    run = run_verify()
    assert run.returncode == 0, run.stdout + run.stderr
    lines = re.findall(r"^\[(\w+)\] (\w+):", run.stdout, re.MULTILINE)
    without_gpu = {} if torch.cuda.is_available() else {"kernels": "SKIP"}
    expected = {**dict.fromkeys(verify.CHECKS, "PASS"), **without_gpu}
    assert lines == [(verdict, name) for name, verdict in expected.items()]
    assert run.stdout.endswith("vllm_roco.verify: PASS\n")


@pytest.mark.engine
def test_step_ends_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hook that ends chunks gone, the report said PASS."""
    monkeypatch.setattr(
        RocoSchedulerMixin,
        "_reserve_prefill_lookahead",
        lambda self, request, num_computed_tokens, num_new_tokens: num_new_tokens,
    )
    with engines_in_process():
        result = verify.run("engine")
    assert result.verdict == "FAIL"
    assert re.search("ended at 1.., not between 64 and 64|would hold", result.details)


def test_a_plugin_that_vllm_leaves_out_fails() -> None:
    run = run_verify("--only", "registration", VLLM_PLUGINS="another")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "[FAIL] registration: vLLM does not know ROCO" in run.stdout
    assert "VLLM_PLUGINS ('another')" in run.stdout
    assert run.stdout.endswith("vllm_roco.verify: FAIL\n")


def test_whatever_a_check_raises_is_in_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> str:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setitem(verify.CHECKS, "hooks", broken)
    report = str(verify.run("hooks"))
    assert "[FAIL] hooks: OSError: libcudart.so.12: cannot open" in report
    assert "in broken" in report


def test_an_unknown_check_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verify.main(["--only", "kernel"])
    assert "invalid choice: 'kernel'" in capsys.readouterr().err
