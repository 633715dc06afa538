# SPDX-License-Identifier: Apache-2.0
"""A few shapes of every kernel; `python -m tests.soak.kernels` is a long run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--smallest"], ["--seconds", "20"]])
def test_kernels_agree_with_float64(arguments: list[str]) -> None:
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        # Triton decides at import, for the whole process
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak.kernels", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(", 0 faults")
