# SPDX-License-Identifier: Apache-2.0
"""What the budget did, for programs: the public way to `vllm_roco.observability`."""

from __future__ import annotations

from vllm_roco.observability.families import PrefixCounts
from vllm_roco.observability.metrics import EngineMetrics, RocoMetrics, get_metrics

__all__ = ["EngineMetrics", "PrefixCounts", "RocoMetrics", "get_metrics"]
