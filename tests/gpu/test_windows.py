# SPDX-License-Identifier: Apache-2.0
"""Models with sliding windows in graphs, asynchronously, beside vLLM's own choice.

As `tests/engine/test_windows.py` and `test_prefix_cache_windows.py`, with vLLM's runner
for GPUs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.engines import roco_arguments
from tests.engine.mixed_models import WINDOW, save_mixed
from tests.engine.prefix_hits import (
    NUM_NEW,
    PROMPTS,
)
from tests.engine.steps import poisoned_free_blocks
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt
from tests.gpu.engines import EAGER, RUNS, gpu_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

ROWS = [{"roco_budget": 64}, {"roco_mode": "prompt"}, {}, {"roco_policy": "h2o"}]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["exaone4", "gpt-oss", "mostly-full"])
def test_nobody_else_changes_an_answer(tmp_path: Path, name: str, run: str) -> None:
    """Freed blocks are poisoned, others have options of their own and prefixes hit."""
    model = save_mixed(name, tmp_path)
    prompts = list(PROMPTS.values())
    work = [prompt for prompt in prompts for _ in ROWS]
    rows = ROWS * len(prompts)
    server = roco_arguments(SMALL_BUDGET)["additional_config"]["roco"]
    options = {"additional_config": {"roco": server | {"allow_full": True}}}
    with gpu_engine(model, SMALL_BUDGET, **EAGER, **options) as engine:
        names = {layer.attn_backend.get_name() for layer in engine.layers.values()}
        assert len(names) == 2 and "ROCO" in names
        expected = [
            engine.generate([prompt], NUM_NEW, extra_args=[row])[0]
            for prompt, row in zip(work, rows, strict=True)
        ]
    assert len(set(expected)) > len(prompts)
    caching = {
        **RUNS[run],
        **options,
        "enable_prefix_caching": True,
        "max_num_seqs": 32,
    }
    with gpu_engine(model, SMALL_BUDGET, **caching) as engine:
        with poisoned_free_blocks(engine):
            for _ in range(2):
                found = engine.generate(work, NUM_NEW, extra_args=rows)
                assert found == expected
        freed = sum(each.num_freed_blocks for each in engine.scheduler.roco_managers)
        assert freed > 0
        pool = engine.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize(
    ("name", "head_size"), [("olmo3", 32), ("gpt-oss", 64), ("gemma3", 256)]
)
def test_graphs_see_sequences_that_a_window_holds_whole(
    tmp_path: Path, name: str, head_size: int
) -> None:
    """FlashAttention's kernels in graphs wrote no output for them."""
    model = save_mixed(name, tmp_path, head_dim=head_size)
    prompts = [random_prompt(length, seed=length) for length in (1, 20, WINDOW - 4)]
    answers = []
    for run in RUNS.values():
        with gpu_engine(model, SMALL_BUDGET, **run, dtype="bfloat16") as engine:
            names = {each.attn_backend.get_name() for each in engine.layers.values()}
            assert names == {"FLASH_ATTN", "ROCO"}
            answers.append([engine.generate([prompt], 8) for prompt in prompts])
    eager, in_graphs = answers
    assert in_graphs == eager
