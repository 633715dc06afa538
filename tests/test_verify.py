# SPDX-License-Identifier: Apache-2.0
"""The report of `python -m vllm_roco.verify`."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from tests.engine.engines import engines_in_process
from tests.fresh_python import run_python
from vllm_roco import verify
from vllm_roco.attention.backend import RocoBackend
from vllm_roco.kv_cache.manager import RocoManager
from vllm_roco.kv_cache.snapshots import SnapshotStore
from vllm_roco.ops import move_blocks, statistics
from vllm_roco.scheduler import RocoSchedulerMixin
from vllm_roco.verify import engine
from vllm_roco.verify.worker import compiled_kernels

take_pending_cow_copies = RocoManager.take_pending_cow_copies


def run_verify(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python(
        ["-m", "vllm_roco.verify", *arguments], environment=os.environ | environment
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
    assert "snapshot hits 2, block hits 0, saved tokens 384" in run.stdout
    assert "layers by backend: ROCO 2; kernels compiled: " in run.stdout
    assert run.stdout.endswith("vllm_roco.verify: PASS\n")


@pytest.mark.engine
def test_step_ends_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hook that ends chunks gone, the report said PASS."""
    monkeypatch.setattr(
        RocoSchedulerMixin,
        "_reserve_prefill_lookahead",
        lambda self, request, num_computed_tokens, num_new_tokens: num_new_tokens,
    )
    with engines_in_process(), contextlib.closing(verify._ENGINE):
        result = verify.run("engine")
    assert result.verdict == "FAIL"
    assert re.search("ended at 1.., not between 64 and 64|would hold", result.details)


@pytest.mark.engine
def test_layers_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that vLLM chose in the place of ours would show in no other line."""
    with engines_in_process(), contextlib.closing(verify._ENGINE):
        verify._ENGINE._engine()
        monkeypatch.setattr(RocoBackend, "get_name", lambda: "ANOTHER")
        result = verify.run("engine")
    assert result.verdict == "FAIL"
    assert "2 layers of full attention had to be of ROCO" in result.details
    assert "layers by backend are: ANOTHER 2" in result.details


def test_compiled_kernels_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each device, however many modules know a kernel."""
    kernel = SimpleNamespace(device_caches={0: ({"a": 1, "b": 2}, {}), 1: ({}, {})})
    before = compiled_kernels()
    for module in (move_blocks, statistics):
        monkeypatch.setattr(module, "a_kernel", kernel, raising=False)
    assert compiled_kernels() == before + 2


@pytest.mark.engine
def test_hits_are_looked_at() -> None:
    """One engine serves all: checks in another order, and hits that go wrong."""
    with engines_in_process(), contextlib.closing(verify._ENGINE):
        hits, steps = verify.run("prefixes"), verify.run("engine")
        assert hits.verdict == steps.verdict == "PASS", f"{hits}\n{steps}"
        assert re.search("published snapshots [12], dead snapshots 0", hits.details)
        assert (
            "snapshot hits 2, block hits 0, saved tokens 384, waits 1" in hits.details
        )

        # what has been read before is a hit for both of the prompts
        again = verify.run("prefixes")
        assert again.verdict == "FAIL"
        assert "[0, 192, 192, 0] tokens had to be there" in again.details
        assert "[192, 192, 192, 0] were" in again.details

        llm = verify._ENGINE._engine()
        assert llm.reset_prefix_cache()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SnapshotStore, "count_hit", lambda *_, **__: None)
            uncounted = verify.run("prefixes")
        assert uncounted.verdict == "FAIL"
        assert "2 hits saved 384 tokens, but the metrics tell" in uncounted.details

        assert llm.reset_prefix_cache()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RocoManager, "take_pending_cow_copies", without_copies)
            without = verify.run("prefixes")
        assert without.verdict == "FAIL"
        assert "goes on with other tokens than when it is read" in without.details


def without_copies(manager: RocoManager) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
    """Make snapshots and rows of blocks to which nothing is copied."""
    copies = take_pending_cow_copies(manager)
    manager.block_pool.free_blocks([block for pair in copies for block in pair])
    return []


def test_an_engine_that_does_not_start_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(folder: object) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(engine, "_start", broken)
    with contextlib.closing(verify._ENGINE):
        for _ in range(2):
            results = [verify.run(name) for name in ("engine", "prefixes")]
            assert [result.verdict for result in results] == ["FAIL", "SKIP"]
            assert "RuntimeError: no such device" in results[0].details
            verify._ENGINE.close()


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
