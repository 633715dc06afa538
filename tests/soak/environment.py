# SPDX-License-Identifier: Apache-2.0
"""What vLLM reads when it is imported; to be imported before it.

Tests have an environment of their own, and nothing is set there; who has only imported
pytest is none.
"""

from __future__ import annotations

import os

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # of 1,024 it would compile a matrix product for each number of tokens of a step,
    # and memory grow by hundreds of MiB until all have been seen
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}.items():
    if "PYTEST_VERSION" not in os.environ:
        os.environ.setdefault(name, value)
