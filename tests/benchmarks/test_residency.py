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
    assert by_step(trace.path) == [
        {
            "step": 1,
            "running": 1,
            "held_tokens": 128,
            "largest_tokens": 128,
            "first_computed_tokens": 128,
            "first_held_tokens": 128,
        },
        {
            "step": 2,
            "running": 2,
            "held_tokens": 208,
            "largest_tokens": 144,
            "first_computed_tokens": 129,
            "first_held_tokens": 144,
        },
        {"step": 3, "running": 1, "held_tokens": 80, "largest_tokens": 80},
    ]


def test_page_is_what_vllm_plans_with() -> None:
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=3, head_size=64, dtype=torch.bfloat16
    )
    spec = RocoSpec.from_attention_spec(full, CONFIG, max_steps_in_flight=2)
    page = Page.of("smollm2-135m")
    assert page.content == 30 * full.page_size_bytes
    assert page.content + page.statistics == 30 * spec.page_size_bytes
