# SPDX-License-Identifier: Apache-2.0
"""Workers that fill blocks with NaN which the scheduler says are nobody's."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from tests.soak.audit import POISON
from vllm_roco.kv_cache.page import page_view

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as StockWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as StockWorker


class PoisoningWorker(StockWorker):  # type: ignore[misc]
    """The platform's worker; on the device, in the order of its steps."""

    _pages: list[torch.Tensor] | None = None

    def execute_model(self, scheduler_output: Any) -> Any:
        """Fill what is nobody's, and run the step."""
        blocks = getattr(scheduler_output, POISON, ())
        if blocks:
            self._poison(blocks)
        return super().execute_model(scheduler_output)

    # the caches may have been made in this mode
    @torch.inference_mode()
    def _poison(self, blocks: list[int]) -> None:
        if self._pages is None:
            layers = get_layers_from_vllm_config(self.vllm_config, Attention)
            self._pages = [
                page_view(layer.kv_cache).view(torch.int8) for layer in layers.values()
            ]
        index = torch.tensor(blocks, device=self._pages[0].device)
        for pages in self._pages:
            # all bits set is not a number in any dtype of a cache
            pages[index] = -1
