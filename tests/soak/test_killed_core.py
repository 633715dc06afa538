# SPDX-License-Identifier: Apache-2.0
"""A killed engine core: errors for its clients, and nothing left for the next one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.soak.engines import Host
from tests.soak.killed_core import run


@pytest.mark.engine
@pytest.mark.slow
def test_clients_get_errors_and_a_restart_starts_anew(
    engine_lock: None, smollm2: Path, tmp_path: Path
) -> None:
    # sockets have short names
    with tempfile.TemporaryDirectory(prefix="k-") as folder:
        assert run(Host(folder=tmp_path), [2.0], Path(folder)) == []
