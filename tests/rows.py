# SPDX-License-Identifier: Apache-2.0
"""Rows of requests that bring no options."""

from __future__ import annotations

from vllm_roco.config import RocoConfig
from vllm_roco.eviction_row import EvictionRow
from vllm_roco.request_options.planner import RequestPlanner


def row_of(config: RocoConfig, block_size: int) -> EvictionRow:
    """Return the row of a server's requests, where it does not depend on the prompt."""
    return RequestPlanner(config, block_size).plan(None, 1).row
