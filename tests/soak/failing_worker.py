# SPDX-License-Identifier: Apache-2.0
"""A CPU worker whose first eviction fails."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_roco.attention.cpu import impl

CAUSE = "the eviction step of a test fails"


class FailingWorker(CPUWorker):
    """Raises in the step in which something is evicted for the first time."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load it, and put the fault in."""
        super().load_model(*args, **kwargs)

        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(CAUSE)

        vars(impl)["evict"] = fail
