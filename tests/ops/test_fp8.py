# SPDX-License-Identifier: Apache-2.0
"""Kernels over an fp8 cache against the reference over the numbers that it holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from tests.ops import test_decode as decode
from tests.ops import test_prefill_attention as prefill_attention
from tests.ops import test_prefill_mass as prefill_mass
from tests.ops.paged_case import Heads, PagedCase
from vllm_roco import fp8_cache
from vllm_roco.ops.fp8 import converts_natively, halves, load_scale, unpack

PROMPTS = [(40, 40), (5, 70), (1, 33), (0, 0)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [Heads(8, 2, 128), Heads(3, 3, 16), Heads(4, 2, 80), Heads(20, 1, 64)]

per_head = pytest.mark.parametrize("per_head", [False, True], ids=["tensor", "head"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@triton.jit
def _convert_kernel(
    content_ptr,  # [256] uint8
    pairs_ptr,  # [128] int16, the same memory
    scale_ptr,  # [1] float32
    unpacked_ptr,  # [256] float32
    halved_ptr,  # [256] float32
    NATIVE: tl.constexpr,
):
    every, pair = tl.arange(0, 256), tl.arange(0, 128)
    numbers = unpack(tl.load(content_ptr + every), tl.float32)
    tl.store(unpacked_ptr + every, numbers * load_scale(scale_ptr, 0, 0, False))
    first, second = halves(tl.load(pairs_ptr + pair), NATIVE)
    scale = load_scale(scale_ptr, 0, 0, NATIVE)
    tl.store(halved_ptr + 2 * pair, first.to(tl.float32) * scale)
    tl.store(halved_ptr + 2 * pair + 1, second.to(tl.float32) * scale)


def test_every_byte_is_the_number_that_it_stands_for(device: torch.device) -> None:
    """Subnormal numbers and both zeros, too, and NaN.

    Taken for 480, it would let a model that has overflowed answer like any other.
    """
    content = torch.arange(256, device=device).to(torch.uint8)
    scale = torch.tensor([0.5], device=device)
    expected = fp8_cache.from_bytes(content, scale)
    assert expected.isfinite().sum() == 254
    for native in {False, converts_natively(device)}:
        unpacked, halved = expected.new_empty(256), expected.new_empty(256)
        _convert_kernel[(1,)](
            content, content.view(torch.int16), scale, unpacked, halved, native
        )
        for found in (unpacked, halved):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            is_zero = expected == 0
            assert torch.equal(found[is_zero].signbit(), expected[is_zero].signbit())


@per_head
@dtypes
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_decode(
    heads: Heads, dtype: torch.dtype, per_head: bool, device: torch.device
) -> None:
    """With either number of splits for each shape, type and kind of scale."""
    case = decode.build([1, 70, 33, 0], heads, device)
    is_split = (SHAPES.index(heads) + DTYPES.index(dtype) + per_head) % 2
    plan = dataclasses.replace(decode.PLAN, splits=3 if is_split else 1)
    decode.check(case.in_fp8(per_head=per_head, dtype=dtype), plan)


@per_head
@pytest.mark.parametrize("splits", [1, 3])
def test_decode_with_sinks(splits: int, per_head: bool, device: torch.device) -> None:
    case = decode.build([1, 70, 33, 0], Heads(8, 2, 32), device)
    case.add_sinks()
    plan = dataclasses.replace(decode.PLAN, splits=splits)
    decode.check(case.in_fp8(per_head=per_head), plan)


@pytest.mark.parametrize("magnitude", [0.0, 1e-25, 1e-5, 1e5, 1e25])
def test_decode_with_bfloat16_queries_beyond_float16(
    magnitude: float, device: torch.device
) -> None:
    """A float16 of such queries is infinite, or zero."""
    case = decode.build([70, 33], Heads(8, 2, 32), device)
    case.query *= magnitude
    case.scale /= magnitude or 1.0
    case = case.in_fp8(per_head=True, dtype=torch.bfloat16)
    decode.check(case, decode.PLAN)


@per_head
def test_soft_cap(per_head: bool, device: torch.device) -> None:
    case = decode.build([90, 17], Heads(4, 2, 32), device)
    case.scale *= 20
    case = case.in_fp8(per_head=per_head)
    decode.check(case, decode.PLAN, soft_cap=5.0)


@pytest.mark.parametrize("token_major", [True, False], ids=["LBNHC", "LBHNC"])
@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_layouts_and_blocks(
    token_major: bool, block_size: int, device: torch.device
) -> None:
    case = decode.build(
        [90, 17, 1, 0],
        Heads(6, 3, 64),
        device,
        block_size=block_size,
        token_major=token_major,
    ).in_fp8(per_head=True)
    decode.check(case, decode.PLAN)


@per_head
@dtypes
def test_prompts(dtype: torch.dtype, per_head: bool, device: torch.device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers")
    for heads in SHAPES:
        case = PagedCase.build(PROMPTS, heads, device)
        case = case.in_fp8(per_head=per_head, dtype=dtype)
        prefill_attention.check(case)
        prefill_mass.check(case)


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@per_head
def test_a_scale_that_is_dropped_is_found(
    name: str, per_head: bool, device: torch.device
) -> None:
    """And one that is taken from another head: or the tests above could not fail."""
    heads = Heads(4, 2, 32)
    case = decode.build([70], heads, device).in_fp8(per_head=per_head)
    prompt = PagedCase.build([(40, 70)], heads, device).in_fp8(per_head=per_head)
    scale = getattr(case, name)
    wrong = scale.flip(0) if per_head else torch.ones_like(scale)
    exact, exact_prompt = case.expected(), prompt.expected()
    for built in (case, prompt):
        setattr(built, name, wrong)
    assert (decode.run(case, decode.PLAN) - exact.output).abs().max() > 0.1
    output, lse = prefill_attention.run(prompt)
    assert (output - exact_prompt.output).abs().max() > 0.1
    if name == "k_scale":
        assert (lse - exact_prompt.lse).abs().max() > 0.1
        with pytest.raises(AssertionError):
            case.check_tails(exact)
        with pytest.raises(AssertionError):
            prefill_mass.check(prompt, exact=exact_prompt)
