# SPDX-License-Identifier: Apache-2.0
"""What sequences hold is read from traces as the engine core writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from benchmarks.serving.residency import BLOCK_SIZE, CONFIG, Page, by_step
from vllm_roco.kv_cache.spec import RocoSpec
from vllm_roco.observability.trace import TraceWriter


def test_by_step(tmp_path: Path) -> None:
    trace = TraceWriter(str(tmp_path / "trace.jsonl"))
    trace.write(1, "a", 128, 8)
    trace.write(2, "a", 129, 9)
    trace.write(2, "b", 64, 4)
    trace.write(3, "b", 65, 5)
    trace.close()
    found = by_step(trace.path)
    assert found.columns.tolist() == [
        *("step", "running", "held_tokens", "largest_tokens"),
        *("first_computed_tokens", "first_held_tokens"),
    ]
    assert found.fillna(-1).to_numpy().tolist() == [
        [1, 1, 128, 128, 128, 128],
        [2, 2, 208, 144, 129, 144],
        [3, 1, 80, 80, -1, -1],
    ]


def test_page_is_what_vllm_plans_with() -> None:
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=3, head_size=64, dtype=torch.bfloat16
    )
    spec = RocoSpec.from_attention_spec(full, CONFIG, max_steps_in_flight=2)
    page = Page.of("smollm2-135m")
    assert page.content == 30 * full.page_size_bytes
    assert page.content + page.statistics == 30 * spec.page_size_bytes
