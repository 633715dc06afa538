# SPDX-License-Identifier: Apache-2.0
"""Kernels run natively on a GPU, else under Triton's interpreter.

Triton decides at import whether it interprets, for every kernel of the process. So on a
machine without GPU these tests run in a process of their own, which
`test_interpreted.py` starts with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_[!i]*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """Let `torch.empty` hand out NaN, so that nobody lives on what memory holds."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
