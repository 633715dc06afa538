# SPDX-License-Identifier: Apache-2.0
"""Plans of requests to one server, and its refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from vllm_roco.config import NAMESPACE, RocoConfig
from vllm_roco.eviction_row import EvictionRow
from vllm_roco.request_options.error import RequestOptionError
from vllm_roco.request_options.planner import RequestPlan, RequestPlanner

SIZE = 16
SERVER = RocoConfig(
    budget=256,
    stride=64,
    chunk=128,
    max_budget=512,
    allow_full=True,
    shield="peak",
    shield_ratio=0.5,
)
LIMITS = {"--one less --another": 300, "--third": 400}
PLANNER = RequestPlanner(SERVER, SIZE, LIMITS)
MOST_INTEGER = 2**31 - 1


def planner(**changes: Any) -> RequestPlanner:
    """Return the planner of a server with other options."""
    config = dataclasses.replace(SERVER, **changes)
    return dataclasses.replace(PLANNER, config=config)


def plan(
    options: Mapping[str, Any] | None = None, prompt: int = 100, **server: Any
) -> RequestPlan:
    """Return what holds for a request with options and a prompt of so many tokens."""
    return planner(**server).plan({NAMESPACE: options or {}}, prompt)


def row(
    options: Mapping[str, Any] | None = None, prompt: int = 100, **server: Any
) -> EvictionRow:
    """Return how it evicts."""
    return plan(options, prompt, **server).row


def refusal(
    options: Mapping[str, Any], prompt: int = 100, **server: Any
) -> RequestOptionError:
    """Return what it is told, for it is refused."""
    with pytest.raises(RequestOptionError) as error:
        plan(options, prompt, **server)
    return error.value
