# SPDX-License-Identifier: Apache-2.0
"""The decode kernel that loads by TMA, which is only timed, answers as ours does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import tensor_descriptors, workload
from benchmarks.kernels.attend_by_tma import attend_by_tma
from benchmarks.kernels.tensor_descriptors import (
    MIN_CAPABILITY,
    SETTINGS,
    TILE_SIZES,
    Variant,
    checked_calls,
    descriptor_plan,
    lacking,
)
from benchmarks.kernels.workload import Shape, Workload
from vllm_roco.kv_cache import page

OURS = descriptor_plan(64, num_stages=2, num_warps=4)


@pytest.fixture
def hopper(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return a device that has a tensor memory accelerator, or is interpreted."""
    if device.type == "cpu":
        # the interpreter takes the bits of bfloat16 for integers
        monkeypatch.setattr(workload, "DTYPE", torch.float16)
    elif torch.cuda.get_device_capability() < MIN_CAPABILITY:
        pytest.skip("needs a GPU with a tensor memory accelerator, or the interpreter")
    return device


def build(shape: Shape, device: torch.device) -> Workload:
    torch.manual_seed(0)
    numel = shape.layers * shape.layer_numel
    return Workload(shape, torch.empty(numel, dtype=workload.DTYPE, device=device))


@pytest.mark.parametrize("block_size", TILE_SIZES)
def test_it_answers_as_ours_does(block_size: int, hopper: torch.device) -> None:
    """The last page is full in one row and holds one token in another."""
    work = build(Shape(3, 2 * block_size + 1, 6, 2, 64), hopper)
    lengths = [2 * block_size + 1, 2 * block_size, block_size - 1]
    work.lengths.copy_(torch.tensor(lengths))
    how = {"block_size": block_size, "table": work.table(block_size)}
    found = []
    for calls in (
        work.roco(OURS, **how),
        work.calls(attend_by_tma, descriptor_plan(block_size, 2, 4), **how),
    ):
        # building calls, of either kernel, has emptied the pages' tails
        cache = next(work.caches(block_size, token_major=False, has_statistics=True))
        work.output.fill_(float("nan"))
        tails = page.statistics_view(cache), page.first_positions_view(cache)
        tails[1].fill_(-1)
        calls[0]()
        found.append([work.output.clone(), *(tail.clone() for tail in tails)])
    ours, other = found
    assert ours[1][..., page.MASS_SUM].sum() == pytest.approx(3 * 2, rel=1e-3)
    # weights are rounded to bfloat16 beside other maxima, then the output is
    torch.testing.assert_close(other[0], ours[0], rtol=2**-6, atol=2**-8)
    torch.testing.assert_close(other[1:], ours[1:], rtol=1e-3, atol=1e-6)


def test_every_variant_is_checked_and_has_its_place(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_descriptors, "SETTINGS", SETTINGS[:1])
    work = build(Shape(2, 70, 4, 2, 64), hopper)
    calls = checked_calls(work, OURS, 64)
    assert list(calls) == [
        variant
        for statistics in ("yes", "no")
        for variant in (
            Variant("roco", 16, statistics),
            Variant("roco", 64, statistics),
            Variant("tma", 64, statistics, *SETTINGS[0]),
        )
    ]
    assert all(len(each) == work.shape.layers for each in calls.values())


def test_a_wrong_kernel_is_found(hopper: torch.device) -> None:
    def wrong_scale(**arguments: object) -> None:
        attend_by_tma(**{**arguments, "scale": 1.0})  # type: ignore[arg-type]

    work = build(Shape(2, 70, 4, 2, 64), hopper)
    plan = descriptor_plan(64, 2, 4)
    for measure in (True, False):
        with pytest.raises(AssertionError, match="errs by"):
            work.check(
                plan,
                block_size=64,
                token_major=False,
                measure=measure,
                kernel=wrong_scale,
            )


def test_masses_of_another_block_size_are_not_read_as_keys(
    hopper: torch.device,
) -> None:
    """After a turn of 64 every kernel of 128 gave NaN, and none of them was timed."""
    work = build(Shape(2, 256, 4, 2, 64), hopper)
    cache = next(work.caches(64, token_major=False, has_statistics=True))
    page.statistics_view(cache).fill_(float("nan"))
    plan = descriptor_plan(128, 2, 4)
    work.check(plan, block_size=128, token_major=False, kernel=attend_by_tma)


def test_a_plan_of_other_tiles_is_refused(hopper: torch.device) -> None:
    work = build(Shape(1, 64, 2, 1, 64), hopper)
    (call, *_) = work.calls(attend_by_tma, OURS, block_size=16)
    with pytest.raises(ValueError, match="must have tiles of 16 tokens, and 1 split"):
        call()


@pytest.mark.parametrize(
    ("capability", "said"),
    [(None, "here is no GPU"), ((8, 9), "here is one of 8.9"), ((9, 0), "")],
)
def test_what_a_device_lacks(capability: tuple[int, int] | None, said: str) -> None:
    found = lacking(capability)
    assert said in found if said else found == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_tma_the_command_says_what_it_needs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["tensor_descriptors", "--out", str(tmp_path), "--shapes", "0", "3"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        tensor_descriptors.main()
    assert "compute capability 9.0 and above" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
