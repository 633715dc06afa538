# SPDX-License-Identifier: Apache-2.0
"""Whether the engine of a soak has room for all that it is sent."""

from __future__ import annotations

import torch
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink

from tests.soak.adapter import RANK
from tests.soak.setups import engine_arguments


def test_a_request_without_an_adapter_has_none_beside_one_that_has() -> None:
    """As vLLM's layers for CPUs work it out, with as many places as a soak has."""
    arguments = engine_arguments(
        cuda=False, dtype="float32", max_num_seqs=2, num_blocks=8, adapter=True
    )
    down = torch.zeros(arguments["max_loras"], 1, RANK, 8)
    up = torch.zeros(arguments["max_loras"], 1, 8, RANK)
    down[0], up[0] = 1, 1
    which = torch.tensor([-1, 0])
    low, added = torch.zeros(2, RANK), torch.zeros(2, 8)
    bgmv_shrink(torch.ones(2, 8), down, low, which)
    bgmv_expand(low, up, added, which)
    assert added.any(1).tolist() == [False, True]
