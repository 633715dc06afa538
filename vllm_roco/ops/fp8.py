# SPDX-License-Identifier: Apache-2.0
"""Keys and values of one byte each: float8 e4m3, times a scale on the device.

Every such number is one of float16 and of bfloat16 as well, so that what is read from
the cache is exact. Its bits, shifted to their places in a float16, are the number times
2^-8. GPUs of compute capability 8.9 and above have an instruction for it.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

_SHIFTED = tl.constexpr(256.0)


@functools.cache
def converts_natively(device: torch.device) -> bool:
    """Return whether a device has an instruction that converts float8 to float16."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def scale_stride(scale: torch.Tensor | None) -> int:
    """Return by how much a kernel goes on from one kv head's scale to the next one's.

    Args:
        scale: Float32, one number for all heads or one for each; None without fp8.
    """
    return int(scale is not None and scale.numel() > 1)


@triton.jit
def load_scale(
    scale_ptr,  # [1] or [num_kv_heads] float32
    stride_scale,
    kv_head,
    NATIVE: tl.constexpr,
):
    """Return by what numbers of `halves`, or if not native of `unpack`, are scaled."""
    scale = tl.load(scale_ptr + kv_head * stride_scale)
    if not NATIVE:
        scale *= _SHIFTED
    return scale


@triton.jit
def _shifted(
    bits,  # int16 or int32, any shape: a signed byte times 2^7, and anything below
):
    """Return the byte's sign and digits in their places of a float16."""
    bits = bits.to(tl.int16) & -0x4080
    # 0x7F is NaN; without the exponent's highest bit it would be 480
    bits |= (bits + 0x80) & 0x4000
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def unpack(
    content,  # uint8, any shape
    dtype: tl.constexpr,
):
    """Return what the bytes stand for, times 2^-8, in a dtype of 16 bits or more."""
    return _shifted(content.to(tl.int8, bitcast=True).to(tl.int16) << 7).to(dtype)


@triton.jit
def halves(
    pairs,  # int16, any shape: two bytes each
    NATIVE: tl.constexpr,
):
    """Return float16 of the first and of the second byte; times 2^-8 unless `NATIVE`.

    Tensor cores take values of 16 bits that lie one token apart, and memory is read in
    no smaller units: of pairs the loads are those of a 16-bit cache.
    """
    if NATIVE:
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 firsts, seconds;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {firsts, seconds}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, firsts;
            cvt.rn.f16x2.e4m3x2 $1, seconds;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        pairs = pairs.to(tl.int32)
        first = _shifted((pairs << 24) >> 17)
        second = _shifted(pairs >> 1)
    return first, second


@triton.jit
def query_for_halves(
    first,  # [ROWS, N], every second number of the queries
    second,  # [ROWS, N], the others
):
    """Return both as they are multiplied with `halves`, and a factor `[ROWS]` float32.

    A bfloat16 query is divided by a power of two, for a float16 has as many digits and
    more, but ends at 65504.
    """
    factor = tl.full([first.shape[0]], 1.0, tl.float32)
    if first.dtype == tl.bfloat16:
        first = first.to(tl.float32)
        second = second.to(tl.float32)
        largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1)
        exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
        factor = tl.maximum(exponent.to(tl.float32, bitcast=True), 1e-30)
        first = (first / factor[:, None]).to(tl.float16)
        second = (second / factor[:, None]).to(tl.float16)
    return first, second, factor
