# SPDX-License-Identifier: Apache-2.0
"""An fp8 cache in models of which some layers have a sliding window.

On CPUs the backend that vLLM chooses for these needs AVX-512 or AMX, and rounds what it
stores toward zero, where RoCo rounds to the nearest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.engines import Engine, running_engine
from tests.engine.mixed_models import save_mixed
from tests.engine.steps import audited_manager, poisoned_free_blocks
from tests.engine.test_windows import (
    BUDGET,
    NOBODY_REACHES,
    NUM_NEW,
    PROMPTS,
    SMALL_POOL,
)
from tests.oracle import Options
from vllm_roco import fp8_cache
from vllm_roco.attention.cpu import impl

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not torch.cpu._is_avx512_supported(),
        reason="needs AVX-512: vLLM's own attention for CPUs has no fp8 cache without",
    ),
]


@contextlib.contextmanager
def running_fp8(
    model: Path, options: Options | None, **arguments: Any
) -> Iterator[Engine]:
    """Run an engine whose every layer has an fp8 cache, and scales of its own."""
    arguments = {"max_model_len": 640, "kv_cache_dtype": "fp8", **arguments}
    with running_engine(model, options, **arguments) as engine:
        for number, layer in enumerate(engine.layers.values()):
            assert layer.kv_cache.dtype == torch.uint8
            scale = 0.011 * (number + 1)
            # vLLM's backend reads the one, RoCo's the other
            layer._k_scale_float = layer._v_scale_float = scale
            layer._k_scale, layer._v_scale = torch.tensor([[scale], [scale]])
        yield engine


def to_bytes_toward_zero(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return what vLLM's own attention for CPUs stores; see `fp8_cache.to_bytes`."""
    content = fp8_cache.to_bytes(numbers, scale)
    stored = fp8_cache.from_bytes(content, torch.ones(1))
    # a byte less is the next number toward zero, of either sign
    return content - (stored.abs() > (numbers.float() / scale).abs()).byte()


@pytest.mark.parametrize("name", ["exaone4", "gemma3", "gpt-oss"])
def test_below_the_budget_it_is_stock_vllms(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for numbers that sums in another order put on the other side of a border."""
    model = save_mixed(name, tmp_path)
    with running_engine(model, None) as engine:
        exact = engine.log_probabilities(PROMPTS)
    with running_fp8(model, None) as engine:
        stock = engine.log_probabilities(PROMPTS)
    with running_fp8(model, NOBODY_REACHES) as engine:
        names = {layer.attn_backend.get_name() for layer in engine.layers.values()}
        assert names == {"ROCO", "CPU_ATTN"}
        nearest = engine.log_probabilities(PROMPTS)
        monkeypatch.setattr(impl, "to_bytes", to_bytes_toward_zero)
        toward_zero = engine.log_probabilities(PROMPTS)
    by_rounding, by_nearest, by_roco = (
        (found - stock).abs().mean() for found in (exact, nearest, toward_zero)
    )
    print(f"{name}: {by_rounding:.1e} {by_nearest:.1e} {by_roco:.1e}")
    assert by_nearest < by_rounding
    assert by_roco < by_nearest / 100


def test_freed_blocks_are_nobodys(tmp_path: Path) -> None:
    """With pages of bytes, too, neither kind of layer reads what another one writes."""
    model = save_mixed("exaone4", tmp_path)
    with running_fp8(model, BUDGET) as engine:
        expected = engine.generate(PROMPTS, NUM_NEW)
    with (
        running_fp8(model, BUDGET, **SMALL_POOL) as engine,
        audited_manager(engine) as steps,
        poisoned_free_blocks(engine),
    ):
        assert engine.generate(PROMPTS, NUM_NEW) == expected
        assert steps.preemptions, "the pool has the wrong size"
        assert engine.manager.num_freed_blocks > 0
        assert engine.num_lost_blocks == 0
