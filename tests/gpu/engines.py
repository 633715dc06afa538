# SPDX-License-Identifier: Apache-2.0
"""The engines of `tests.engine.engines`, with the settings that a GPU wants."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.engine.engines import Engine, running_engine
from tests.oracle import Options

EAGER: dict[str, Any] = dict(enforce_eager=True)
FULL_GRAPHS: dict[str, Any] = dict(
    enforce_eager=False,
    # without torch.compile, which takes longer than any of these tests
    compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
)
RUNS: dict[str, dict[str, Any]] = {
    "eager": dict(EAGER, async_scheduling=False),
    "full-graphs-async": dict(FULL_GRAPHS, async_scheduling=True),
}
"""The simplest way to run, and the one that servers take."""
PIECEWISE_GRAPHS: dict[str, Any] = dict(
    enforce_eager=False, compilation_config={"cudagraph_mode": "PIECEWISE"}
)


def gpu_engine(
    model: Path, options: Options | None, **arguments: Any
) -> AbstractContextManager[Engine]:
    """Run an engine with full graphs in this process.

    Args:
        model: A Hugging Face folder.
        options: Of the plugin; None for another backend.
        arguments: Of `LLM`.
    """
    defaults = dict(
        # a size of its own, so that nothing else on the GPU is mistaken for the engine
        kv_cache_memory_bytes=2**30,
        gpu_memory_utilization=0.3,
    )
    return running_engine(model, options, **{**defaults, **FULL_GRAPHS, **arguments})
