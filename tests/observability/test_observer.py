# SPDX-License-Identifier: Apache-2.0
"""A real scheduler serves on, whatever happens to its metrics and its trace."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.observability.conftest import Warnings
from tests.scheduler_driver import Driver, Setup
from vllm_roco.observability import publisher as publisher_module
from vllm_roco.observability.metrics import read_engines


@pytest.fixture(scope="module", autouse=True)
def first_scheduler() -> None:
    """Let vLLM set its log up, which takes handlers away, before a test adds one."""
    Setup().scheduler().shutdown()


def engines_of(driver: Driver) -> int:
    return len(read_engines(driver.scheduler.vllm_config.instance_id))


def serve(driver: Driver) -> None:
    """Finish two requests, one of which evicts."""
    names = [driver.add(30, 12), driver.add(5, 9)]
    while driver.scheduler.has_requests():
        driver.schedule()
        driver.complete()
    assert [len(driver.outputs[name]) for name in names] == [12, 9]


def warning_about(what: str, warnings: Warnings) -> str:
    """Return the only warning, which is about one thing."""
    (warning,) = warnings.messages
    assert warning.startswith(f"roco: {what} ends here, and the engine goes on without")
    return warning


def test_a_trace_on_a_full_disk_ends(warnings: Warnings) -> None:
    """The error came out of `schedule()`, and stopped the engine."""
    driver = Driver(Setup(trace="/dev/full"))
    serve(driver)
    serve(driver)
    assert engines_of(driver) == 1
    driver.scheduler.shutdown()
    assert "No space left on device" in warning_about("the trace", warnings)


def test_a_trace_that_was_removed_ends(tmp_path: Path, warnings: Warnings) -> None:
    path = tmp_path / "trace.jsonl"
    driver = Driver(Setup(trace=str(path)))
    serve(driver)
    assert path.stat().st_size
    path.unlink()
    serve(driver)
    serve(driver)
    driver.scheduler.shutdown()
    assert "somebody has removed its file" in warning_about("the trace", warnings)


def test_a_trace_that_was_closed_ends(tmp_path: Path, warnings: Warnings) -> None:
    driver = Driver(Setup(trace=str(tmp_path / "trace.jsonl")))
    observer = driver.scheduler._observer
    assert observer._trace is not None
    observer._trace.close()
    serve(driver)
    warning_about("the trace", warnings)


def test_a_trace_that_is_rotated_goes_on(tmp_path: Path, warnings: Warnings) -> None:
    path, rotated = tmp_path / "trace.jsonl", tmp_path / "trace.jsonl.1"
    driver = Driver(Setup(trace=str(path)))
    serve(driver)
    path.rename(rotated)
    before = rotated.stat().st_size
    serve(driver)
    driver.scheduler.shutdown()
    assert rotated.stat().st_size > before
    assert all(json.loads(line) for line in rotated.read_text().splitlines())
    assert warnings.messages == []


@pytest.mark.parametrize("cache_is_taken", [False, True])
def test_a_taken_directory_stops_no_start(
    cache_is_taken: bool, directory: Path, warnings: Warnings
) -> None:
    """Anybody could make it first, and every start was refused."""
    directory.touch()
    if cache_is_taken:
        Path(os.environ["XDG_CACHE_HOME"]).touch()
    driver = Driver(Setup())
    serve(driver)
    assert engines_of(driver) == (0 if cache_is_taken else 1)
    driver.scheduler.shutdown()
    if cache_is_taken:
        assert "Set TMPDIR" in warning_about("publishing metrics", warnings)
    else:
        (warning,) = warnings.messages
        assert "the metrics lie in" in warning


def test_metrics_whose_directory_is_taken_end(
    directory: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "CHECK_SECONDS", 0.0)
    driver = Driver(Setup())
    serve(driver)
    assert engines_of(driver) == 1
    shutil.rmtree(directory)
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    serve(driver)
    serve(driver)
    assert engines_of(driver) == 0
    driver.scheduler.shutdown()
    assert list(directory.iterdir()) == []
    assert str(directory) in warning_about("publishing metrics", warnings)


def test_a_stopped_scheduler_may_be_stopped_again() -> None:
    driver = Driver(Setup())
    driver.scheduler.shutdown()
    driver.scheduler._observer.close()
    serve(driver)
    assert engines_of(driver) == 0
