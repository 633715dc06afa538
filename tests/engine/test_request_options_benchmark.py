# SPDX-License-Identifier: Apache-2.0
"""The benchmark of requests with options runs, whatever the clock says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving import request_options
from benchmarks.serving.request_options import CASES, SERVER, SIDES, rounds, step_us
from benchmarks.specs import BLOCK_SIZE
from tests.engine.engines import running_engine
from vllm_roco.attention.request_rows import RequestRows

pytestmark = pytest.mark.engine

COUNT = 4
ARGUMENTS: dict[str, Any] = dict(
    attention_backend="roco",
    block_size=BLOCK_SIZE,
    additional_config={"roco": asdict(SERVER)},
    disable_log_stats=False,
    max_num_batched_tokens=2048,
)


def test_sides_take_turns_and_their_rows_arrive(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_options, "NUM_STEPS", 16)
    monkeypatch.setattr(request_options, "MARGIN", 8)
    seen: list[torch.Tensor | None] = []
    of_step = RequestRows.of_step

    def recorded(self: RequestRows, common: Any) -> torch.Tensor | None:
        rows = of_step(self, common)
        seen.append(rows)
        return rows

    monkeypatch.setattr(RequestRows, "of_step", recorded)
    with running_engine(tiny_llama, None, **ARGUMENTS) as engine:
        for case in CASES:
            (times,) = rounds(engine.llm, case, COUNT, num_rounds=1)
            assert times.keys() == set(SIDES)
            assert min(times.values()) > 0
            numbers = {}
            for side in SIDES:
                seen.clear()
                step_us(engine.llm, case, side, COUNT)
                numbers[side] = {
                    0 if rows is None else len(rows.unique(dim=0)) for rows in seen
                }
            assert numbers == {"none": {0}, "equal": {1}, "different": {COUNT}}
        monkeypatch.setattr(request_options, "NUM_STEPS", 25)
        monkeypatch.setattr(request_options, "MARGIN", 0)
        with pytest.raises(RuntimeError, match="Raise --max-num-batched-tokens"):
            step_us(engine.llm, CASES[0], "none", COUNT)
        assert engine.num_lost_blocks == 0
