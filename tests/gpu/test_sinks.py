# SPDX-License-Identifier: Apache-2.0
"""A model's attention sinks in prompts, in decodes and inside graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import AttentionLayer

from tests.configs import engine_config
from tests.engine.agreement import assert_agreement
from tests.engine.tiny_models import (
    TINY_BUDGET,
    load_for_oracle,
    random_prompt,
    save_tiny_model,
)
from tests.gpu.engines import FULL_GRAPHS, PIECEWISE_GRAPHS, gpu_engine
from tests.gpu.kept_blocks import recorded_kept_blocks
from tests.gpu.test_equals_stock import Disagreement, answers_of
from tests.ops.paged_case import Heads, PagedCase, assert_as_good_as
from tests.oracle import generate
from vllm_roco.attention.bound_caches import CacheViews
from vllm_roco.attention.cuda.metadata import Prefills
from vllm_roco.attention.cuda.step_buffers import StepBuffers
from vllm_roco.ops.device import Device
from vllm_roco.ops.prefill_plan import PrefillScratch, plan_prefill

pytestmark = pytest.mark.gpu

PROMPTS = [random_prompt(length, seed=length) for length in (230, 33, 129, 80)]
NUM_NEW = 104


@pytest.mark.engine
@pytest.mark.usefixtures("engine_lock")
@pytest.mark.parametrize("name", ["gpt-oss", "granite-swa"])
def test_sinks_count_as_stock_vllms(name: str, tmp_path: Path) -> None:
    """With full graphs, which read what the sinks are at the moment.

    Sums in another order, in attention and, for gpt-oss, in experts, close small gaps;
    without sinks, large ones close too.
    """
    folder = save_tiny_model(name, tmp_path)
    with gpu_engine(folder, None, attention_backend="TRITON_ATTN") as engine:
        stock = answers_of(engine, PROMPTS, NUM_NEW)
    with gpu_engine(folder, replace(TINY_BUDGET, budget=512)) as engine:
        ours = answers_of(engine, PROMPTS, NUM_NEW)
        assert engine.manager.num_freed_blocks == 0
        for layer in engine.layers.values():
            # which is as if there were none
            layer.impl.sinks.data.fill_(-torch.inf)
        without = answers_of(engine, PROMPTS, NUM_NEW)
    found, lost = (Disagreement.between(x, stock) for x in (ours, without))
    assert lost.parted == len(PROMPTS)
    assert found.widest_gap < lost.widest_gap / 8


# not gpt-oss, of whose experts the sums depend on the step's size
@pytest.mark.engine
@pytest.mark.usefixtures("engine_lock")
@pytest.mark.parametrize("graphs", [FULL_GRAPHS, PIECEWISE_GRAPHS], ids=["full", "pw"])
def test_evictions_are_the_oracles(graphs: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_model("granite-swa", tmp_path)
    model = load_for_oracle(folder)
    expected = [generate(model, prompt, TINY_BUDGET, NUM_NEW) for prompt in PROMPTS]
    with (
        gpu_engine(folder, TINY_BUDGET, **graphs, async_scheduling=True) as engine,
        recorded_kept_blocks(engine) as kept,
    ):
        tokens = engine.generate(PROMPTS, NUM_NEW)
        assert engine.num_lost_blocks == 0
    assert_agreement(PROMPTS, tokens, kept, expected)


@pytest.mark.parametrize("heads", [Heads(8, 2, 64), Heads(7, 1, 128)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("version", [None, 2], ids=["own", "FA2"])
def test_prompts_through_flash_attention(
    version: int | None, dtype: str, heads: Heads, tmp_path: Path
) -> None:
    """FlashAttention 2 knows no sinks, and 3 none of float16.

    Whole prompts, chunks of others, and one token behind evicted blocks.
    """
    # not at the top: a machine without a GPU collects these tests too
    from vllm.v1.attention.backends.fa_utils import is_fa_version_supported

    from vllm_roco.attention.cuda.impl import RocoCudaImpl

    device = torch.device("cuda")
    case = PagedCase.build(
        [(40, 40), (33, 90), (200, 700), (1, 33)],
        heads,
        device,
        dtype=getattr(torch, dtype),
    )
    case.add_sinks()
    # FlashAttention reads behind the last token
    case.kv_cache.nan_to_num_()
    exact, low = case.expected(), case.expected(dtype=case.query.dtype)
    vllm_config = engine_config(
        tmp_path,
        {},
        dtype=dtype,
        max_model_len=4096,
        max_num_seqs=4,
        max_num_batched_tokens=4096,
    )
    with set_current_vllm_config(vllm_config):
        impl = RocoCudaImpl(
            heads.q_heads,
            heads.head_size,
            case.scale,
            heads.kv_heads,
            sinks=case.sinks,
        )
    if version is not None:
        if not is_fa_version_supported(version):
            pytest.skip(f"vLLM has no FlashAttention {version} here")
        impl.flash_version = version
    assert impl.flash_version is not None
    keys, values = case.kv_cache.transpose(1, 2).chunk(2, -1)
    views = CacheViews(
        case.kv_cache, keys, values, case.statistics, case.first_positions
    )
    nothing = torch.zeros_like(case.evicted_before)
    step = StepBuffers(
        nothing,
        case.live_table,
        case.live_lens,
        case.live_lens,
        case.evicted_before,
        nothing,
    )
    output = torch.empty_like(case.query)
    impl._prefill(
        # which would have the scales of an fp8 cache
        cast("AttentionLayer", None),
        case.query,
        views,
        output,
        Prefills(
            first_token=0,
            num_tokens=len(case.query),
            step=step,
            query_start_loc=case.query_start_loc,
            max_query_len=200,
            max_live_tokens=case.max_live_tokens,
            max_measured_tokens=case.max_live_tokens,
            plan=plan_prefill(
                head_size=heads.head_size,
                block_size=case.block_size,
                dtype=case.query.dtype,
                device=Device.of(device),
            ),
            scratch=PrefillScratch.allocate(device),
        ),
    )
    assert_as_good_as(output, exact.output, low.output)
    torch.testing.assert_close(
        case.statistics, exact.statistics, rtol=1e-4, atol=1e-5, equal_nan=True
    )
