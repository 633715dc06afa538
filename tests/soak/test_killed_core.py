# SPDX-License-Identifier: Apache-2.0
"""A killed process: errors for its clients, and nothing left for the next one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.every_form import only_with_every_form
from tests.soak.engines import Host
from tests.soak.killed_core import run


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "rank"),
    [
        pytest.param({}, None, id="core"),
        pytest.param({"tensor": 2}, 1, id="tensor", marks=only_with_every_form),
        pytest.param({"pipeline": 2}, 1, id="pipeline", marks=only_with_every_form),
    ],
)
def test_clients_get_errors_and_a_restart_starts_anew(
    ranks: dict[str, int],
    rank: int | None,
    engine_lock: None,
    smollm2: Path,
    tmp_path: Path,
) -> None:
    # sockets have short names
    with tempfile.TemporaryDirectory(prefix="k-") as folder:
        assert run(Host(folder=tmp_path, **ranks), [2.0], Path(folder), rank) == []
