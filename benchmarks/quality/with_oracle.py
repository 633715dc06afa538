# SPDX-License-Identifier: Apache-2.0
"""Measure cells with the oracle: the methods that the plugin is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import override

from benchmarks.quality import cells
from benchmarks.quality.cells import Cell, Job, Setup
from benchmarks.quality.oracle import EvictionMethod, Oracle, Turn
from benchmarks.quality.oracle.eviction_method import RULES
from benchmarks.quality.tasks import Question

BLOCK_METHODS = ("roco", "recent")


def method_of(setup: Setup) -> EvictionMethod:
    """Return a setup in the oracle's words."""
    changes = dict(setup.options)
    if setup.policy in BLOCK_METHODS:
        changes["unit"] = setup.block_size
    if setup.policy == "roco":
        changes |= {"shield": setup.shield, "shield_ratio": setup.shield_ratio}
        if setup.shield != RULES["roco"].shield:
            changes.setdefault("neighbours", 0.0)
    return EvictionMethod.named(
        setup.policy, setup.budget, setup.stride, setup.chunk, **changes
    )


class Engine(cells.Engine):
    """The oracle, for any cells."""

    @override
    def __init__(self, model: str, cells: Job) -> None:
        # kernels for bfloat16 are slow on CPUs
        device, dtype = "cpu", torch.float32
        if torch.cuda.is_available():
            device, dtype = "cuda", torch.bfloat16
        self._oracle = Oracle(model, device, dtype)

    @override
    def answers(
        self,
        cell: Cell,
        prompts: Sequence[list[int]],
        max_tokens: int,
        *,
        to_the_end: bool = False,
    ) -> list[list[int]]:
        turns = [[Turn(prompt, max_tokens, to_the_end)] for prompt in prompts]
        answers = self._oracle.converse(turns, method_of(cell.setup))
        return [answer for (answer,) in answers]

    @override
    def converse(
        self, cell: Cell, conversations: Sequence[Sequence[Question]]
    ) -> list[list[list[int]]]:
        turns = [
            [Turn(each.token_ids, each.max_tokens, each.to_the_end) for each in asked]
            for asked in conversations
        ]
        return self._oracle.converse(turns, method_of(cell.setup))

    @override
    def losses(
        self, cell: Cell, texts: Sequence[list[int]], first: int
    ) -> list[list[float]]:
        return self._oracle.losses(texts, method_of(cell.setup), first)
