# SPDX-License-Identifier: Apache-2.0
"""A step's later layers are launched as the first was, with tensors of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops import test_decode as decode
from tests.ops.paged_case import Heads, PagedCase
from vllm_roco import reference
from vllm_roco.kv_cache import page
from vllm_roco.ops.decode.attention import decode_attention
from vllm_roco.ops.decode.plan import DecodePlan
from vllm_roco.ops.decode.splits import DecodeSplits
from vllm_roco.ops.launch import Launch, alike
from vllm_roco.ops.prefill_mass import measure_prefill
from vllm_roco.ops.prefill_plan import PrefillPlan, PrefillScratch

HEADS = Heads(4, 2, 32)


def other_layer(case: PagedCase) -> PagedCase:
    """Return the same step in a layer with other numbers everywhere."""
    cache = reference.paged_cache(
        num_blocks=len(case.kv_cache),
        num_kv_heads=HEADS.kv_heads,
        block_size=case.block_size,
        head_size=HEADS.head_size,
        dtype=case.kv_cache.dtype,
        device=case.query.device,
        token_major=False,
    )
    # keys and values of the other kv head, and half of what was measured
    cache.copy_(case.kv_cache.flip(1))
    page.statistics_view(cache).copy_(case.statistics / 2)
    page.first_positions_view(cache).copy_(case.first_positions)
    scales = [
        None if scale is None else scale * 1.5 for scale in (case.k_scale, case.v_scale)
    ]
    return replace(
        case,
        query=-case.query,
        kv_cache=cache,
        sinks=None if case.sinks is None else case.sinks - 1,
        k_scale=scales[0],
        v_scale=scales[1],
    )


@pytest.mark.parametrize("measure", [True, False], ids=["", "no statistics"])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("in_fp8", [False, True], ids=["", "fp8"])
@pytest.mark.parametrize(
    "plan",
    [decode.PLAN, replace(decode.PLAN, splits=1, shares=4)],
    ids=["apart", "in turns"],
)
def test_decode_attention(
    plan: DecodePlan,
    in_fp8: bool,
    has_sinks: bool,
    measure: bool,
    device: torch.device,
) -> None:
    case = decode.build([70, 300, 33, 0], HEADS, device)
    if has_sinks:
        case.add_sinks()
    if in_fp8:
        case = case.in_fp8(per_head=True)
    other = other_layer(case)
    expected = [layer.expected() for layer in (case, other)]
    splits = DecodeSplits.allocate([(4, plan)], HEADS.kv_heads, device)
    splits.deal(case.live_lens, plan)
    output, its_output = torch.empty_like(case.query), torch.empty_like(case.query)
    launch = decode_attention(
        query=case.query,
        kv_cache=case.kv_cache,
        live_table=case.live_table,
        live_lens=case.live_lens,
        splits=splits,
        measured_lens=case.live_lens,
        evicted_before=case.evicted_before,
        statistics=case.statistics if measure else None,
        output=output,
        scratch=decode.scratch_for(case, plan, measure=measure),
        plan=plan,
        scale=case.scale,
        sinks=case.sinks,
        k_scale=case.k_scale,
        v_scale=case.v_scale,
    )
    launch.again(
        other.query,
        other.kv_cache,
        other.statistics if measure else None,
        its_output,
        other.sinks,
        other.k_scale,
        other.v_scale,
    )
    found = zip((output, its_output), expected, strict=True)
    for attended, exact in found:
        torch.testing.assert_close(attended, exact.output, rtol=1e-4, atol=1e-5)
    assert (output - its_output).abs().max() > 0.1
    if measure:
        case.check_tails(expected[0])
        other.check_tails(expected[1])


@pytest.mark.parametrize("in_fp8", [False, True], ids=["", "fp8"])
def test_measuring_prompts(in_fp8: bool, device: torch.device) -> None:
    case = PagedCase.build([(40, 70), (17, 33)], HEADS, device)
    if in_fp8:
        case = case.in_fp8(per_head=True)
    other = other_layer(case)
    expected = [layer.expected() for layer in (case, other)]
    launch = measure_prefill(
        query=case.query,
        kv_cache=case.kv_cache,
        lse=expected[0].lse,
        query_start_loc=case.query_start_loc,
        live_table=case.live_table,
        live_lens=case.live_lens,
        evicted_before=case.evicted_before,
        statistics=case.statistics,
        max_live_tokens=case.max_live_tokens,
        plan=PrefillPlan(rows=16, columns=16, num_warps=4, num_stages=2, splits=2),
        scratch=PrefillScratch.allocate(device),
        scale=case.scale,
        k_scale=case.k_scale,
    )
    launch.again(
        other.query,
        other.kv_cache,
        expected[1].lse,
        other.statistics,
        other.k_scale,
    )
    case.check_tails(expected[0])
    other.check_tails(expected[1])


def test_what_may_replace_a_tensor() -> None:
    """All that a variant is compiled for, and the address does not matter."""
    memory = torch.zeros(8, 64, dtype=torch.bfloat16)
    of_first = alike(memory[:, :32], None)
    assert alike(torch.zeros_like(memory)[:, :32], None) == of_first
    assert alike(memory[:, 8:40], None) == of_first
    assert alike(memory[:, 1:33], None) != of_first
    assert alike(memory[:, :64:2], None) != of_first
    assert alike(memory[:, :32], memory) != of_first
    assert alike(memory[:, :32].half(), None) != of_first
    assert alike(memory.view(torch.float16)[:, :32], None) != of_first
    assert alike(memory[:, :16], None) != of_first
    # a scale for all heads, and one for each
    assert alike(torch.ones(1)) != alike(torch.ones(4))


def test_a_launch_is_made_again_with_addresses_in_its_places() -> None:
    made: list[tuple[object, ...]] = []
    launch = Launch(lambda *values: made.append(values), [1, 2, 3], ["a", "b", "c"])
    first, second = torch.zeros(2, 4)
    launch.again(launch.places("c", "a"), [first, second])
    launch.again(launch.places("c"), [second])
    assert made == [
        (second.data_ptr(), 2, first.data_ptr()),
        (second.data_ptr(), 2, second.data_ptr()),
    ]
