# SPDX-License-Identifier: Apache-2.0
"""What sequences hold is read from traces as the engine core writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rows import RESULTS, matching, read
from benchmarks.serving.residency import (
    bound_tokens,
    by_step,
    kv_cache_bytes,
    statistics_share,
)
from vllm_roco.observability.trace import TraceWriter

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("model", ["smollm2-135m", "llama-3.1-8b"])
def test_what_is_planned_is_what_was_measured_with(model: str) -> None:
    kept = matching(read(RESULTS / "memory.csv"), model=model)
    assert kept["kv_cache_bytes"].tolist() == [kv_cache_bytes(model)] * 2
    roco = matching(kept, backend="ROCO").iloc[0]
    assert roco["bound_tokens"] == bound_tokens(model)


@pytest.mark.parametrize(
    ("model", "share"),
    [("smollm2-135m", "1.0 %"), ("qwen2.5-7b", "0.4 %"), ("llama-3.1-8b", "0.4 %")],
)
def test_the_page_tells_the_statistics_share(model: str, share: str) -> None:
    assert f"{100 * statistics_share(model):.1f} %" == share
    assert share in (ROOT / "docs/performance.md").read_text()
