# SPDX-License-Identifier: Apache-2.0
"""FlashAttention's layers with a window, beside RoCo's, in graphs of any length.

FlashAttention 3 can have a step's schedule worked out before its kernels are launched.
vLLM's builder has that done for the longest sequence of the step, and a captured graph
takes it for one as long as the model allows. For these two a window is not the same: a
step that it holds whole has none. The schedule then has another form, and the graph's
kernels write no output. vLLM leaves the schedule out where FlashAttention serves layers
with a window and others; beside RoCo it sees those with a window alone.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

from vllm_roco.attention.layers import roco_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FLASH_ATTN = "vllm.v1.attention.backends.flash_attn"
"""Module of vLLM's backend, with the function that looks for windows."""

NO_WINDOW = (-1, -1)
"""What a layer of full attention has in FlashAttention's terms."""


def count_layers_without_window() -> None:
    """Let FlashAttention's builders see RoCo's layers, as if they were their own.

    To be called while builders are made: the backend's module is there by then if it
    serves a layer, and no step has been built.
    """
    module = sys.modules.get(FLASH_ATTN)
    if module is None or hasattr(module._get_sliding_window_configs, "_of_roco"):
        return
    windows_of = module._get_sliding_window_configs

    @functools.wraps(windows_of)
    def wrapped(vllm_config: VllmConfig) -> set[tuple[int, int] | None]:
        windows: set[tuple[int, int] | None] = windows_of(vllm_config)
        if windows and roco_layers(vllm_config):
            windows.add(NO_WINDOW)
        return windows

    wrapped._of_roco = True  # type: ignore[attr-defined]
    module._get_sliding_window_configs = wrapped  # type: ignore[attr-defined]
