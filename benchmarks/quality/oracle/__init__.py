# SPDX-License-Identifier: Apache-2.0
"""Cache eviction over a Hugging Face model, in plain PyTorch: every method, in batches.

Shares no code with the plugin, so that the two can be held against each other, and
carries the methods that the plugin lacks, so that it can be judged by them.
"""

from benchmarks.quality.oracle.eviction_method import EvictionMethod
from benchmarks.quality.oracle.oracle import Oracle, Turn

__all__ = ["EvictionMethod", "Oracle", "Turn"]
