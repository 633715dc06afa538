# SPDX-License-Identifier: Apache-2.0
"""What a worker of the real engine tells of itself.

Imported by the engine's processes, which may not be the one that asks.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXTENSION = f"{__name__}.WorkerReport"
"""For vLLM's `worker_extension_cls`."""


class WorkerReport:
    """Methods that vLLM adds to its worker, for `LLM.collective_rpc`."""

    vllm_config: VllmConfig

    def roco_layers(self) -> dict[str, int]:
        """Return how many attention layers each backend has, by its name."""
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return dict(
            Counter(
                layer.get_attn_backend().get_name()
                for layer in layers
                if isinstance(layer, AttentionLayerBase)
            )
        )

    def roco_compiled_kernels(self) -> int:
        """Return how many variants of our kernels this process has compiled so far.

        One that Triton had on disk counts as well.
        """
        return compiled_kernels()


def compiled_kernels() -> int:
    """Return how many variants of our Triton kernels this process has."""
    ours = [name for name in sys.modules if name.startswith("vllm_roco.ops.")]
    # modules import each other's kernels
    things = {id(it): it for name in ours for it in vars(sys.modules[name]).values()}
    caches = [getattr(thing, "device_caches", None) for thing in things.values()]
    return sum(
        # of a device, the first is what was compiled
        len(of_device[0])
        for by_device in caches
        if isinstance(by_device, Mapping)
        for of_device in by_device.values()
    )
