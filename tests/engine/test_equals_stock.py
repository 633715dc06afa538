# SPDX-License-Identifier: Apache-2.0
"""With a budget that nobody reaches, the plugin is vLLM's stock backend."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.engines import running_engine
from tests.engine.steps import recorded_steps
from tests.oracle import Options
from tools.passkey import build_passkey
from vllm_roco.attention.cpu.impl import RocoCpuImpl
from vllm_roco.kv_cache.page import (
    MASS_PEAK,
    MASS_SQUARES,
    MASS_SUM,
    statistics_view,
)

pytestmark = pytest.mark.engine

CHUNK = 64
NUM_NEW = 9
"""Each answer begins another block."""
OPTIONS = Options(
    policy="roco",
    shield="peak",
    shield_ratio=0.7,
    budget=1024,
    stride=64,
    chunk=CHUNK,
    sink=16,
    recent=32,
    block_size=16,
)


def test_tokens_and_statistics(smollm2: Path, prose: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [
        build_passkey(tokenizer, num_tokens=270, depth=0.3, seed=1).token_ids,
        tokenizer(prose)["input_ids"][:203],
        tokenizer("The capital of Japan is Tokyo, and that of France is")["input_ids"],
    ]

    # the least that RoCo takes, so that prompts are read in several steps
    steps_of = {
        "max_num_seqs": len(prompts),
        "max_num_batched_tokens": len(prompts) + CHUNK,
    }
    with (
        running_engine(smollm2, None, **steps_of) as engine,
        recorded_steps(engine) as stock_steps,
    ):
        expected = engine.generate_one_by_one(prompts, NUM_NEW)

    with running_engine(smollm2, OPTIONS, **steps_of) as engine:
        with measured_layers() as num_calls, recorded_steps(engine) as steps:
            alone = engine.generate_one_by_one(prompts, NUM_NEW)
        assert ends(steps.scheduled) == ends(stock_steps.scheduled)
        assert num_calls == dict.fromkeys(engine.layers, len(steps.scheduled))
        assert len(num_calls) == 30
        with measured_layers(), recorded_steps(engine) as steps:
            together = engine.generate(prompts, NUM_NEW)
        assert any(len(step) == len(prompts) for step in steps.scheduled)
        assert engine.manager.num_freed_blocks == 0
    assert alone == expected
    assert together == expected


def ends(scheduled: list[dict[str, int]]) -> list[tuple[int, ...]]:
    """Return the tokens of each step, without the names of the requests."""
    return [tuple(step.values()) for step in scheduled]


@contextlib.contextmanager
def measured_layers() -> Iterator[Counter[str]]:
    """Count the steps of each layer, and check its statistics after each of them."""
    num_calls: Counter[str] = Counter()
    forward = RocoCpuImpl.forward
    signature = inspect.signature(forward)

    def check_and_count(
        impl: RocoCpuImpl, layer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = forward(impl, layer, *args, **kwargs)
        call = signature.bind(impl, layer, *args, **kwargs).arguments
        if call["attn_metadata"] is not None:
            num_calls[layer.layer_name] += 1
            for batch in call["attn_metadata"].batches:
                states = impl.page_shape.states_view(call["kv_cache"])
                check_statistics(states, batch)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RocoCpuImpl, "forward", check_and_count)
        yield num_calls


def check_statistics(kv_cache: torch.Tensor, batch: Any) -> None:
    """Check what no eviction has touched.

    Every query so far gave all its attention, 1 in each head, to blocks that live.
    """
    for row, blocks in enumerate(batch.table):
        statistics = statistics_view(kv_cache)[blocks[batch.is_live[row]]]
        total = statistics[..., MASS_SUM].sum(0)
        num_queries = batch.live_tokens[row].float()
        torch.testing.assert_close(
            total, num_queries.expand_as(total), rtol=1e-5, atol=0
        )
        mass, squares, peak = (
            statistics[..., x] for x in (MASS_SUM, MASS_SQUARES, MASS_PEAK)
        )
        assert (peak > 0).all() and (peak <= 1 + 1e-5).all()
        assert (squares <= mass * peak * (1 + 1e-5)).all()
        assert (squares >= peak.square() * (1 - 1e-5)).all()
