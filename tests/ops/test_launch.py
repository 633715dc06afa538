# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from vllm_roco.ops.launch import Launcher


def _fill(
    out_ptr,
    source_ptr,
    fixed,
    varying,
    SIZE: tl.constexpr,
):
    index = tl.arange(0, SIZE)
    value = tl.load(source_ptr + index) + fixed * 1000 + varying
    tl.store(out_ptr + index, value)


_fill_kernel = triton.jit(do_not_specialize=["varying"])(_fill)
_fill_from_anywhere_kernel = triton.jit(
    do_not_specialize=["varying"], do_not_specialize_on_alignment=["source_ptr"]
)(_fill)


def launched(
    launch: Launcher, source: torch.Tensor, *, fixed: int, varying: int, size: int
) -> list[int]:
    out = torch.zeros(size, dtype=torch.int32, device=source.device)
    launch(
        (1, 1, 1),
        {"num_warps": 1},
        out_ptr=out,
        source_ptr=source,
        fixed=fixed,
        varying=varying,
        SIZE=size,
    )
    return [int(number) for number in out]


def test_a_variant_is_used_for_what_it_was_compiled_for(device: torch.device) -> None:
    """1, multiples of 16, other numbers and odd addresses each have their own.

    Under the interpreter nothing is compiled, and only the count can fail.
    """
    launch = Launcher(_fill_kernel)
    # loads are vectors from 128 numbers a warp on, which an odd address would break
    numbers = torch.arange(512, dtype=torch.int32, device=device)
    for fixed in (1, 2, 16, 17, 1, 16):
        for varying in (0, 1, 7, 16):
            for first in (0, 1, 4):
                for size in (128, 256):
                    found = launched(
                        launch, numbers[first:], fixed=fixed, varying=varying, size=size
                    )
                    start = first + 1000 * fixed + varying
                    assert found == list(range(start, start + size))
    # numbers, addresses, sizes; the interpreter's kernels do not say what varies
    variants = 4 * 2 * 2 * (4 if device.type == "cpu" else 1)
    assert len(launch._variants) == variants
    launched(launch, numbers.short(), fixed=1, varying=0, size=128)
    assert len(launch._variants) == variants + 1


def test_one_variant_for_addresses_of_every_kind(device: torch.device) -> None:
    """The first call decides what is compiled, so it is of an aligned address."""
    launch = Launcher(_fill_from_anywhere_kernel)
    numbers = torch.arange(512, dtype=torch.int32, device=device)
    for first in (0, 1, 4, 2):
        found = launched(launch, numbers[first:], fixed=1, varying=2, size=256)
        assert found == list(range(first + 1002, first + 1002 + 256))
    # the interpreter's kernels do not say so
    assert len(launch._variants) == (2 if device.type == "cpu" else 1)


def test_arguments_in_another_order_are_refused(device: torch.device) -> None:
    """A variant takes its arguments by place; what is refused leaves nothing behind."""
    launch = Launcher(_fill_kernel)
    numbers = torch.arange(16, dtype=torch.int32, device=device)
    with pytest.raises(TypeError, match=r"_fill takes \['out_ptr', 'source_ptr"):
        launch(
            (1, 1, 1),
            {"num_warps": 1},
            out_ptr=torch.zeros_like(numbers),
            source_ptr=numbers,
            varying=1,
            fixed=1,
            SIZE=16,
        )
    for fixed in (1, 16):
        found = launched(launch, numbers, fixed=fixed, varying=1, size=16)
        assert found == list(range(1 + 1000 * fixed, 17 + 1000 * fixed))
    assert len(launch._variants) == 2


def test_kinds_and_options_tell_variants_apart(device: torch.device) -> None:
    """Triton compiles another one for 1.0 than for 1, and for two warps."""
    launch = Launcher(_fill_kernel)
    numbers = torch.arange(128, dtype=torch.int32, device=device)
    for count, (fixed, warps) in enumerate([(1, 1), (1.0, 1), (True, 1), (1, 2)], 1):
        launch(
            (1, 1, 1),
            {"num_warps": warps},
            out_ptr=torch.zeros_like(numbers),
            source_ptr=numbers,
            fixed=fixed,
            varying=2,
            SIZE=128,
        )
        assert len(launch._variants) == count


@triton.jit
def _count_kernel(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, SIZE), tl.arange(0, SIZE))


def test_a_kernel_of_one_tensor(device: torch.device) -> None:
    out = torch.zeros(16, dtype=torch.int32, device=device)
    for _ in range(2):
        Launcher(_count_kernel)((1, 1, 1), {"num_warps": 1}, out_ptr=out, SIZE=16)
        assert out.tolist() == list(range(16))
