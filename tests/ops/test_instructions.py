# SPDX-License-Identifier: Apache-2.0
"""What kernels are compiled to for a Hopper GPU, with and without one."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile

import pytest
import torch
from triton import knobs
from triton.compiler import CompiledKernel

from benchmarks.kernels.attend_by_tma import attend_by_tma
from benchmarks.kernels.tensor_descriptors import (
    SETTINGS,
    TILE_SIZES,
    descriptor_plan,
)
from benchmarks.kernels.workload import DTYPE, Shape, Workload
from tests.compilations import ImaginedCompilation, imagined_compilations
from tests.ops.test_select_victims import BLOCK_SIZE, SMALL, Group, options, steps_of
from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.ops.decode.plan import DecodePlan
from vllm_roco.ops.device import H100

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


def ends_of_a_step(
    steps: list[tuple[int, int]], schedule: EvictionSchedule, head_size: int
) -> dict[str, ImaginedCompilation]:
    """Return the kernels that close a step with evictions, by name.

    Args:
        steps: Lengths of the rows before the step and behind it.
        schedule: By which they evict.
        head_size: Of keys and values.
    """
    with imagined_compilations() as found:
        group = Group.build(
            steps, schedule, torch.device("cpu"), layers=1, head_size=head_size
        )
        for measures in (True, False):
            group.launch(options(schedule), measures=measures)
    return {variant.kernel: variant for variant in found}


def test_no_kernel_waits_for_what_it_adds_to() -> None:
    """By default an atomic operation is a fence before and behind it.

    Each contribution was raised twice between two of them: 16 fences of the whole GPU
    for a row of up to 1,024 blocks, in every layer and head, and 128 for 8,192 blocks,
    each of which throws a multiprocessor's L1 cache away.
    """
    ends = ends_of_a_step(steps_of(SMALL), SMALL, head_size=16)
    compiled = {name: variant.compile() for name, variant in ends.items()}
    assert set(compiled) >= {"_contribution_kernel", "_select_kernel", "_recent_kernel"}
    atomics = {name: _lines(kernel, "atom", "red") for name, kernel in compiled.items()}
    assert any("max" in line for line in atomics["_contribution_kernel"])
    for lines in atomics.values():
        assert all(".relaxed." in line for line in lines)
    fence = re.compile(r"\b(fence\.(acq_rel|sc)\.(gpu|sys)|membar\.(gl|sys))\b")
    assert not any(fence.search(kernel.asm["ptx"]) for kernel in compiled.values())


@pytest.mark.parametrize(
    ("blocks", "contribution", "score", "select"),
    [(1024, 64, 64, 64), (16384, 64, 512, 1280)],
)
def test_few_of_a_threads_blocks_are_not_in_registers(
    blocks: int, contribution: int, score: int, select: int
) -> None:
    """Of 16,384 a thread held 64 scores, and 128 contributions: more than registers.

    Of the scores ptxas left 32 registers and 3,680 bytes of stack, and the kernel that
    selects took 19 s to compile; of the contributions it left 1,232 bytes of stack.
    """
    # with those that go as many as a program looks at
    stride = 64
    schedule = EvictionSchedule(BLOCK_SIZE, blocks * BLOCK_SIZE - 2 * stride, stride)
    edge = schedule.budget + stride
    ends = ends_of_a_step([(edge - 1, edge)], schedule, head_size=128)
    assert _stack_bytes(ends["_contribution_kernel"].compile()) <= contribution
    assert _stack_bytes(ends["_score_kernel"].compile()) <= score
    assert _stack_bytes(ends["_select_kernel"].compile()) <= select


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("block_size", TILE_SIZES)
def test_pages_are_loaded_by_tma(block_size: int, measure: bool) -> None:
    """Keys and values are, ahead by as many tiles as there are stages.

    No load of another kind is so deep that it would be a page's.
    """
    shape = Shape(2, 2 * block_size, 8, 2, 128)
    workload = Workload(shape, torch.empty(shape.layers * shape.layer_numel).to(DTYPE))
    for setting in SETTINGS:
        plan = descriptor_plan(block_size, *setting)
        with imagined_compilations() as found:
            call, *_ = workload.calls(
                attend_by_tma, plan, block_size=block_size, measure=measure
            )
            call()
        (variant,) = found
        compiled = variant.compile()
        assert compiled.asm["ptx"].count("cp.async.bulk.tensor") == 2 * plan.num_stages
        assert "cp.async.cg" not in compiled.asm["ptx"]
        assert compiled.metadata.shared <= H100.shared_memory


def _stack_bytes(kernel: CompiledKernel) -> int:
    """Return the bytes of a thread that ptxas has found no registers for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        run = subprocess.run(
            [tool, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    (found,) = re.findall(r"\bSTACK:(\d+)", run.stdout)
    return int(found)


def _lines(kernel: CompiledKernel, *instructions: str) -> list[str]:
    """Return the lines of a kernel's PTX that hold one of these."""
    return [
        line
        for line in kernel.asm["ptx"].splitlines()
        if any(f"{name}.global" in line for name in instructions)
    ]


def test_programs_of_decode_attention_wait_for_each_other() -> None:
    """Which Triton's interpreter, where one runs after another, cannot tell."""
    kernels: dict[bool, dict[str, str]] = {}
    for apart in (True, False):
        plan = DecodePlan(
            tile=64,
            splits=2 if apart else 1,
            num_warps=4,
            num_stages=3,
            dependent_launch=True,
            shares=4,
            least_tokens=64,
        )
        shape = Shape(2, 256, 8, 2, 128)
        with imagined_compilations() as found:
            workload = Workload(shape, torch.zeros(shape.layers * shape.layer_numel))
            workload.pool = workload.pool.to(DTYPE)
            workload.roco(plan)[0]()
        kernels[apart] = {each.kernel: each.compile().asm["ptx"] for each in found}
    merging = kernels[False]["attend_kernel"]
    # all threads have stored before one tells that the program is done
    (arrival,) = re.findall(r"atom\.[\w.]*add\S*", merging)
    assert ".acq_rel." in arrival
    assert ".gpu." in arrival
    before = merging[: merging.index(arrival)]
    assert before.rindex("bar.sync") > before.rindex("st.global")
    assert "griddepcontrol" not in merging
    # the second kernel begins early, and waits before it reads
    assert "griddepcontrol.launch_dependents" in kernels[True]["attend_kernel"]
    combining = kernels[True]["combine_kernel"]
    assert combining.count("griddepcontrol.wait") == 2
    assert "atom." not in kernels[True]["attend_kernel"]
    # rows are ranked before they are read in their order
    dealing = kernels[True]["_deal_kernel"]
    ranked = [match.start() for match in re.finditer("st.global", dealing)]
    assert any("bar.sync" in dealing[a:b] for a, b in itertools.pairwise(ranked))
