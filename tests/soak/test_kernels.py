# SPDX-License-Identifier: Apache-2.0
"""A few shapes of every kernel; `python -m tests.soak.kernels` is a long run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

RUNS = """
import sys
from tests.soak import kernels
for arguments in ["--smallest"], ["--seconds", "20"]:
    sys.argv[1:] = arguments
    if kernels.main():
        sys.exit(1)
"""


@pytest.mark.slow
def test_kernels_agree_with_float64() -> None:
    """One process: to import Triton and vLLM takes as long as the smallest shapes."""
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        # Triton decides at import, for the whole process
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", RUNS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ends = [line.endswith(", 0 faults") for line in done.stdout.splitlines()]
    assert ends == [True, True], done.stdout
