# SPDX-License-Identifier: Apache-2.0
"""Kernels run natively on a GPU, else under Triton's interpreter.

Triton decides at import whether it interprets, for every kernel of the process. So on a
machine without GPU these tests run in a process of their own, which
`test_interpreted.py` starts with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_[!i]*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
