# SPDX-License-Identifier: Apache-2.0
"""Runs `demo.sh` and looks at what it leaves."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tools.demo.options import port_trouble

DEMO = Path(__file__).parents[2] / "demo.sh"


def run_demo(
    arguments: Sequence[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DEMO, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_nothing_is_left(environment: dict[str, str], port: int) -> None:
    assert list(Path(environment["TMPDIR"]).iterdir()) == []
    assert port_trouble(port) is None
