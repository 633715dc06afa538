# SPDX-License-Identifier: Apache-2.0
"""Scheduling and block accounting on every tested release, not only the installed one.

A hook can keep its name and its signature and mean something else in another release;
only running it tells. Each test here is a run of pytest, in a process of its own, over
tests that pass on the installed release too.
"""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.fresh_python import run_python
from tests.inner_run import order_options
from tests.releases import release_path
from tools.releases import other_releases

ROOT = Path(__file__).parents[1]
FILES = [
    "tests/test_answer_start.py",
    "tests/test_chunking.py",
    "tests/test_conversations.py",
    "tests/test_eviction_schedule.py",
    "tests/test_scheduler*.py",
    "tests/test_prefix_*.py",
    "tests/test_longest_hits.py",
    "tests/test_window_prefixes.py",
    "tests/test_request_plans.py",
    "tests/test_block_sharing.py",
    "tests/test_tenants.py",
    "tests/kv_cache/test_*.py",
    "tests/attention/cuda/test_flash_windows.py",
]


def found(patterns: list[str]) -> set[str]:
    """Return the test files that patterns stand for, relative to the checkout."""
    files = {pattern: [*ROOT.glob(pattern)] for pattern in patterns}
    assert all(files.values()), f"one of these stands for no file: {patterns}"
    return {str(file.relative_to(ROOT)) for group in files.values() for file in group}


# one run, because each has to import vLLM
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", other_releases())
def test_passes_on_another_release(
    version: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    release_path(version)
    files = found(FILES)
    report = tmp_path / "report.xml"
    command = ["-m", "tests.on_release", version]
    # temporary folders of its own: pytest clears away those of runs before
    options = [f"--junitxml={report}", f"--basetemp={tmp_path / 'temporary'}"]
    options.append("--color=no")
    run = run_python(
        [*command, *options, *order_options(pytestconfig), *sorted(files)],
        folder=ROOT,
        environment={
            name: os.environ[name] for name in os.environ if "PYTEST" not in name
        },
        stderr=subprocess.STDOUT,
        timeout=None,
    )
    if run.returncode:
        pytest.fail(f"on vLLM {version}:\n{run.stdout}", pytrace=False)
    assert files_run(report) == files, f"a file ran no test:\n{run.stdout}"


def files_run(report: Path) -> set[str]:
    """Return the files of the tests that ran.

    Raises:
        AssertionError: A test was skipped, which none has to be on another release.
    """
    cases = ET.parse(report).findall(".//testcase")
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    assert not skipped, f"skipped: {skipped}"
    return {case.get("classname", "").replace(".", "/") + ".py" for case in cases}
