# SPDX-License-Identifier: Apache-2.0
"""Some hostile options; `python -m tests.soak.hostile` tries 20,000."""

from __future__ import annotations

from tests.soak.hostile import run


def test_every_door_takes_or_says_why_not() -> None:
    """A start with a value too deep to print was a RecursionError."""
    counts, faults = run(600, number=0)
    assert faults == []
    assert counts.total() >= 600
    for name in ("request", "command_line", "config_file"):
        assert counts[f"{name} taken"] and counts[f"{name} refused"]
