# SPDX-License-Identifier: Apache-2.0
"""Measure cells with the oracle: the methods that the plugin is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch

from benchmarks.quality.cells import Cell, Setup
from benchmarks.quality.oracle import EvictionMethod, Oracle


def method_of(setup: Setup) -> EvictionMethod:
    """Return a setup in the oracle's words."""
    changes = dict(setup.options)
    if setup.shield:
        changes |= {"shield": setup.shield, "shield_ratio": setup.shield_ratio}
    own = {field.name for field in fields(EvictionMethod)}
    return EvictionMethod(
        setup.policy,
        budget=setup.budget,
        stride=setup.stride,
        chunk=setup.chunk,
        block_size=setup.block_size,
        options=tuple(item for item in changes.items() if item[0] not in own),
        **{name: value for name, value in changes.items() if name in own},
    )


class Engine:
    """The oracle, for any cells."""

    def __init__(self, model: str, cells: Sequence[Cell]) -> None:
        # kernels for bfloat16 are slow on CPUs
        device, dtype = "cpu", torch.float32
        if torch.cuda.is_available():
            device, dtype = "cuda", torch.bfloat16
        self._oracle = Oracle(model, device, dtype)

    def answers(
        self, cell: Cell, prompts: Sequence[list[int]], max_tokens: int
    ) -> list[list[int]]:
        """Return the greedy continuation of every prompt."""
        return self._oracle.generate(prompts, method_of(cell.setup), max_tokens)

    def losses(
        self, cell: Cell, texts: Sequence[list[int]], first: int
    ) -> list[list[float]]:
        """Return the nats of every token from the `first` on."""
        return self._oracle.losses(texts, method_of(cell.setup), first, "prompt")

    def close(self) -> None:
        """Do nothing: it ends with its process."""
