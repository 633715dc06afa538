# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the memory that steps take."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from tests.attention.rig import config_for
from tests.kv_cache.specs import roco_spec
from vllm_roco.attention.cuda.eviction import EvictionScratch
from vllm_roco.attention.cuda.step_bounds import StepBounds
from vllm_roco.attention.cuda.step_buffers import StepBuffers
from vllm_roco.ops.decode.plan import DecodeScratch
from vllm_roco.ops.device import H100
from vllm_roco.ops.prefill_plan import PrefillScratch

MIB = 2**20

DEFAULT = StepBounds(
    rows=512,
    live_tokens=2048 + 256 - 1 + 8192,
    evicting_tokens=2048 + 256 - 1 + 8192,
    measured_tokens=2048 + 256,
    decode_tokens=2048 + 256,
    block_size=16,
    resident_blocks=128,
    measures=True,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_size=128,
    dtype=torch.bfloat16,
)
"""Llama 8B with the default options, 8,192 tokens a step and graphs up to 512 rows."""

LARGE = dataclasses.replace(
    DEFAULT,
    rows=1024,
    live_tokens=32768 + 4096 - 1 + 16384,
    evicting_tokens=32768 + 4096 - 1 + 16384,
    measured_tokens=32768 + 4096,
    decode_tokens=32768 + 4096,
    resident_blocks=2048,
    num_q_heads=64,
)
"""64 heads, a budget of 32K, 16K tokens a step and 1,024 sequences."""


@pytest.mark.parametrize(
    ("bounds", "most"), [(DEFAULT, 23), (LARGE, 597)], ids=["default", "large"]
)
def test_what_steps_take(bounds: StepBounds, most: int) -> None:
    """They took 40 MiB and 917 MiB.

    Outputs of splits were kept for launches without any, and what eviction needs lay
    beside what attention needs, though never at the same time.
    """
    assert most - 1 < bounds.memory_bytes(H100) / MIB <= most


@pytest.mark.parametrize("policy", ["roco", "recent"])
def test_bytes_are_those_that_tensors_take(policy: str) -> None:
    bounds = dataclasses.replace(
        DEFAULT,
        rows=40,
        live_tokens=2000,
        evicting_tokens=2000,
        measures=policy == "roco",
    )
    device = torch.device("cpu")
    buffers = StepBuffers.allocate(bounds.rows, bounds.live_blocks, device)
    scratch = torch.empty(bounds.scratch_numbers(H100))
    tensors = [getattr(buffers, field.name) for field in dataclasses.fields(buffers)]
    prefill = vars(PrefillScratch.allocate(device)).values()
    taken = sum(tensor.nbytes for tensor in [*tensors, scratch, *prefill])
    assert bounds.memory_bytes(H100) == taken
    # each of both fits, from the first number on
    decode = DecodeScratch.over(scratch, bounds.decode_scratch(H100))
    eviction = EvictionScratch.over(scratch, bounds.eviction_scratch)
    slices = 8 if bounds.measures else 0
    assert eviction.scores.shape == (40, slices, 2, 125)
    assert eviction.moves.shape == (40, 128, 2)
    assert eviction.num_moves.shape == (40,)
    parts = [decode.partial_output, decode.partial_lse, decode.partial_sums]
    assert scratch.data_ptr() in (parts[0].data_ptr(), eviction.moves.data_ptr())
    for group in (parts, [eviction.scores, eviction.moves, eviction.num_moves]):
        taken_by = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in group if x.numel()]
        assert all(start % 256 == scratch.data_ptr() % 256 for start, _ in taken_by)
        ends = [end for _, end in taken_by]
        assert all(a <= b for a, (b, _) in zip(ends, taken_by[1:], strict=False))


def test_every_launch_has_room() -> None:
    """Also those with few rows, which split most."""
    size = DEFAULT.decode_scratch(H100)
    heads, head_size = DEFAULT.num_q_heads, DEFAULT.head_size
    blocks = math.ceil(DEFAULT.measured_tokens / DEFAULT.block_size)
    assert size.max_blocks == blocks
    for rows in range(1, DEFAULT.rows + 1):
        lse = DEFAULT.decode_plan(rows, H100).kept_splits(rows) * heads
        assert lse <= size.partial_lse
        assert lse * head_size <= size.partial_output
        assert rows * heads * blocks <= size.partial_sums


def test_bounds_are_those_of_the_configuration() -> None:
    vllm_config = config_for({"budget": 64, "stride": 32})
    spec = roco_spec(budget=64, stride=32)
    bounds = StepBounds.of(spec, vllm_config, num_q_heads=4, num_layers=2)
    # 4 sequences, and no graphs on a CPU
    assert bounds.rows == 4
    # 4,096 tokens a step, but a sequence is no longer either
    assert bounds.live_tokens == 4096
    assert bounds.decode_tokens == 96
    assert bounds.live_blocks == 256
    assert (bounds.resident_blocks, bounds.measures) == (4, True)


def test_budgets_of_requests_have_room() -> None:
    options = {"budget": 64, "stride": 32, "max_budget": 512}
    spec = roco_spec(budget=64, stride=32)
    for allow_full in (False, True):
        vllm_config = config_for({**options, "allow_full": allow_full})
        # the configurations of all tests share one
        scheduler = copy.copy(vllm_config.scheduler_config)
        scheduler.max_num_batched_tokens = 1024
        vllm_config.scheduler_config = scheduler
        bounds = StepBounds.of(spec, vllm_config, num_q_heads=4, num_layers=2)
        assert bounds.evicting_tokens == 512 + 32 - 1 + 1024
        # a request that keeps everything is never measured, and has no victims
        longest = 4096 if allow_full else bounds.evicting_tokens
        assert bounds.live_tokens == longest
        assert bounds.measured_tokens == 512 + 32
        assert bounds.resident_blocks == 32
        # splits are for what requests keep that bring no options
        assert bounds.decode_tokens == 96
    # where the server's own mode keeps more, so are the splits
    for mode, most in (("full", 4096), ("generation", 544)):
        vllm_config = config_for({**options, "allow_full": True, "mode": mode})
        bounds = StepBounds.of(spec, vllm_config, num_q_heads=4, num_layers=2)
        assert bounds.decode_tokens == most


def test_a_budget_beyond_every_sequence_takes_no_more_memory() -> None:
    """Room was made for moves that no row can have: of 2^31 tokens, a tebibyte."""
    spec = roco_spec(budget=64, stride=32)

    def bounds_of(max_budget: int) -> StepBounds:
        options = {"budget": 64, "stride": 32, "max_budget": max_budget}
        return StepBounds.of(spec, config_for(options), num_q_heads=4, num_layers=2)

    longest = bounds_of(4096)
    assert longest.resident_blocks == 256
    assert bounds_of(2**31 - 16) == longest


@pytest.mark.parametrize(("agree", "copies"), [(True, 2), (False, 0)])
def test_ranks_have_room_for_what_they_tell_each_other(
    agree: bool, copies: int
) -> None:
    vllm_config = config_for({"budget": 64, "stride": 32, "agree": agree})
    vllm_config.parallel_config = copy.copy(vllm_config.parallel_config)
    vllm_config.parallel_config.tensor_parallel_size = 2
    spec = roco_spec(budget=64, stride=32)
    bounds = StepBounds.of(spec, vllm_config, num_q_heads=4, num_layers=2)
    # of 4 sequences in 256 blocks, what both stages go by
    assert bounds.eviction_scratch.shared == copies * 4 * 2 * 256
    # of a decode that is due, all that it attends over
    assert bounds.evicting_decode_blocks == 6


@pytest.mark.parametrize(
    ("model", "tiled"), [(torch.float32, torch.float32), (torch.bfloat16, torch.uint8)]
)
def test_tiles_of_an_fp8_cache(model: torch.dtype, tiled: torch.dtype) -> None:
    """Its numbers become float32 where the query is, which fills larger tiles."""
    vllm_config = config_for({"budget": 64, "stride": 32})
    vllm_config.model_config = copy.copy(vllm_config.model_config)
    vllm_config.model_config.dtype = model
    spec = roco_spec(budget=64, stride=32, dtype=torch.uint8)
    bounds = StepBounds.of(spec, vllm_config, num_q_heads=4, num_layers=2)
    assert bounds.dtype == tiled
