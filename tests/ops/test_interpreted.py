# SPDX-License-Identifier: Apache-2.0
"""Runs this folder's tests under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.inner_run import order_options

FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available(),
    reason="the kernel tests run in this process",
)
def test_kernels_under_the_interpreter(pytestconfig: pytest.Config) -> None:
    """One run: what another imports and collects takes as long as many tests."""
    files = {*FOLDER.rglob("test_*.py")} - {Path(__file__)}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *order_options(pytestconfig)]
        + sorted(map(str, files)),
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
