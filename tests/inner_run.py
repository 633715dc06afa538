# SPDX-License-Identifier: Apache-2.0
"""For tests that run pytest in a process of its own."""

from __future__ import annotations

import pytest


def order_options(config: pytest.Config) -> list[str]:
    """Return the options that give an inner run the outer one's order.

    Args:
        config: The outer run's; its seed is the one that is printed.
    """
    seed = config.getoption("randomly_seed", None)
    return ["-p", "no:randomly"] if seed is None else [f"--randomly-seed={seed}"]
