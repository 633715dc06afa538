# SPDX-License-Identifier: Apache-2.0
"""Workers that fill blocks with NaN which the scheduler says are nobody's.

Beside layers with a window it is a large number: these do not stand what is none behind
the end of a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from tests.soak.audit import POISON
from vllm_roco.attention.layers import roco_layers
from vllm_roco.kv_cache.page import page_view

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as StockWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as StockWorker


class PoisoningWorker(StockWorker):  # type: ignore[misc]
    """The platform's worker; on the device, in the order of its steps."""

    _pages: list[torch.Tensor] | None = None
    _poison_value = 0

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
            own = {id(layer) for layer in roco_layers(self.vllm_config)}
            caches = [layer.kv_cache for layer in layers.values()]
            if len(own) == len(layers):
                # all bits set is not a number in any dtype of a cache
                self._poison_value = -1
                self._pages = [page_view(cache).view(torch.int8) for cache in caches]
            else:
                self._poison_value = 10_000
                self._pages = [
                    page_view(layer.kv_cache) if id(layer) in own else layer.kv_cache
                    for layer in layers.values()
                ]
        device = self._pages[0].device
        # a step that waits for the device would not be the one that is served
        index = torch.tensor(blocks, pin_memory=device.type == "cuda")
        index = index.to(device, non_blocking=True)
        for pages in self._pages:
            pages[index] = self._poison_value
