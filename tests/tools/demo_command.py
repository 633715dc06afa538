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
    """Run it to its end, whatever its exit status."""
    return subprocess.run(
        [DEMO, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )


def assert_nothing_is_left(environment: dict[str, str], port: int) -> None:
    """Check that a run's temporary files are gone and that its port is free."""
    left = [path.name for path in Path(environment["TMPDIR"]).iterdir()]
    # importing torch makes a folder for what it may compile
    left = [name for name in left if not name.startswith("torchinductor_")]
    assert not left, left
    assert port_trouble(port) is None
