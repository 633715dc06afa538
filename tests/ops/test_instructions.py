# SPDX-License-Identifier: Apache-2.0
"""What kernels are compiled to for a Hopper GPU, with and without one."""

from __future__ import annotations

import os
import re

import pytest
import torch
from triton.compiler import CompiledKernel

from tests.compilations import imagined_compilations
from tests.ops.test_select_victims import SMALL, Group, options, steps_of
from vllm_roco.ops import contribution, score_blocks

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


def compiled_ends_of_a_step() -> dict[str, CompiledKernel]:
    """Return the kernels that close a step with evictions, by name."""
    with imagined_compilations() as found:
        group = Group.build(steps_of(SMALL), SMALL, torch.device("cpu"), layers=1)
        for measures in (True, False):
            group.launch(options(SMALL), measures=measures)
    return {variant.kernel: variant.compile() for variant in found}


def test_no_kernel_waits_for_what_it_adds_to() -> None:
    """By default an atomic operation is a fence before and behind it.

    Each contribution was raised twice between two of them: 16 fences of the whole GPU
    for a row of up to 1,024 blocks, in every layer and head, and 128 for 8,192 blocks,
    each of which throws a multiprocessor's L1 cache away.
    """
    compiled = compiled_ends_of_a_step()
    assert set(compiled) >= {"_contribution_kernel", "_select_kernel", "_recent_kernel"}
    atomics = {name: _lines(kernel, "atom", "red") for name, kernel in compiled.items()}
    assert any("max" in line for line in atomics["_contribution_kernel"])
    for lines in atomics.values():
        assert all(".relaxed." in line for line in lines)
    fence = re.compile(r"\b(fence\.(acq_rel|sc)\.(gpu|sys)|membar\.(gl|sys))\b")
    assert not any(fence.search(kernel.asm["ptx"]) for kernel in compiled.values())


@pytest.mark.parametrize("blocks", [16, 1024, 8192, 16384])
def test_a_thread_has_few_blocks(blocks: int) -> None:
    """Of 16,384 a thread held 64 scores, and 128 contributions: more than registers.

    Of the scores ptxas left 32 registers and 3,680 bytes of stack, and the kernel that
    selects took 19 s to compile; of the contributions it left 1,232 bytes of stack.
    """
    assert blocks <= 32 * 32 * score_blocks.num_warps_of(blocks)
    assert blocks <= 64 * 32 * contribution._num_warps_of(blocks)


def _lines(kernel: CompiledKernel, *instructions: str) -> list[str]:
    """Return the lines of a kernel's PTX that hold one of these."""
    return [
        line
        for line in kernel.asm["ptx"].splitlines()
        if any(f"{name}.global" in line for name in instructions)
    ]
