# SPDX-License-Identifier: Apache-2.0
"""What the options of a request are called."""

from __future__ import annotations

from vllm_roco.config import NAMESPACE

PREFIX = f"{NAMESPACE}_"
"""What keys begin with, where each option has one."""

OPTIONS = (
    *("budget", "stride", "chunk", "sink", "recent"),
    *("shield", "shield_ratio", "policy", "seed", "mode"),
)
"""What a request may bring."""

FULL = "full"
"""The mode, and the budget, of a request that evicts nothing."""
