# SPDX-License-Identifier: Apache-2.0
"""What the budget did, counted in an engine's processes and read by the front end.

vLLM gives a plugin no field in the statistics that travel from the engine core to the
front end, so each engine core keeps its numbers in a small memory-mapped file that the
front end reads whenever somebody asks (`vllm_roco.observability.file`). Publishing
costs the scheduler three stores.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_roco.observability.file import (
    FREED,
    MAX,
    MOVED,
    PEAK,
    Identity,
    MetricsFile,
    find_values,
    frontend_pid,
    read_files,
)

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine


@dataclass(frozen=True, kw_only=True)
class EngineMetrics:
    """The numbers of one engine core since it started.

    Attributes:
        engine: Data-parallel index of the engine core, 0 without data parallelism.
        model_name: Served name of the model, as in vLLM's own metrics.
        budget_tokens: The option `budget`.
        freed_blocks: Blocks given back to vLLM's block manager by the budget. Blocks
            of finished or preempted requests do not count.
        moved_blocks: Blocks that were copied over evicted ones, each once for all
            layers; see `MovedBlocks`.
        max_sequence_kv_tokens: Most KV tokens that one running sequence holds now,
            in whole blocks.
        peak_sequence_kv_tokens: Most KV tokens that one sequence ever held.
    """

    engine: int
    model_name: str
    budget_tokens: int
    freed_blocks: int
    moved_blocks: int
    max_sequence_kv_tokens: int
    peak_sequence_kv_tokens: int


@dataclass(frozen=True, kw_only=True)
class RocoMetrics:
    """The numbers of every engine core that serves one model.

    Attributes:
        engines: One entry per engine core, by engine index; never empty.
    """

    engines: tuple[EngineMetrics, ...]

    @property
    def budget_tokens(self) -> int:
        """The option `budget`, the same in every engine."""
        return self.engines[0].budget_tokens

    @property
    def freed_blocks(self) -> int:
        """Blocks given back by the budget, summed over the engines."""
        return sum(engine.freed_blocks for engine in self.engines)

    @property
    def moved_blocks(self) -> int:
        """Blocks that were copied over evicted ones, summed over the engines."""
        return sum(engine.moved_blocks for engine in self.engines)

    @property
    def max_sequence_kv_tokens(self) -> int:
        """Most KV tokens that one running sequence of any engine holds now."""
        return max(engine.max_sequence_kv_tokens for engine in self.engines)

    @property
    def peak_sequence_kv_tokens(self) -> int:
        """Most KV tokens that one sequence of any engine ever held."""
        return max(engine.peak_sequence_kv_tokens for engine in self.engines)


class MetricsPublisher:
    """The engine core's side: owns one file and writes its numbers.

    Not thread-safe: one thread, the scheduler's, publishes.

    Args:
        instance_id: `VllmConfig.instance_id`, which the front end's copy of the
            configuration shares.
        engine: Data-parallel index of this engine core.
        model_name: Served name of the model.
        budget_tokens: The option `budget`.

    Raises:
        PermissionError: The directory of the files is not this user's alone.
        OSError: The file cannot be written.
    """

    def __init__(
        self, *, instance_id: str, engine: int, model_name: str, budget_tokens: int
    ) -> None:
        self._file = MetricsFile(
            Identity(
                instance_id=instance_id,
                frontend_pid=frontend_pid(),
                engine=engine,
                model_name=model_name,
                budget_tokens=budget_tokens,
            )
        )
        self._values = self._file.values
        self._peak = 0

    @property
    def moved_blocks(self) -> int:
        """What a worker wrote, see `MovedBlocks`."""
        return self._values[MOVED]

    def publish(self, freed_blocks: int, max_sequence_kv_tokens: int) -> None:
        """Show new numbers; call it whenever the scheduler changed them.

        Args:
            freed_blocks: Blocks given back by the budget since the engine started.
            max_sequence_kv_tokens: Most KV tokens one running sequence holds now:
                blocks held times block size, 0 when nothing runs.
        """
        values = self._values
        values[FREED] = freed_blocks
        values[MAX] = max_sequence_kv_tokens
        if max_sequence_kv_tokens > self._peak:
            self._peak = values[PEAK] = max_sequence_kv_tokens

    def close(self) -> None:
        """Remove the file. Closing twice is harmless."""
        self._file.close()


class MovedBlocks:
    """A worker's side: counts blocks copied over evicted ones, in its engine's file.

    One worker of an engine counts: tensor-parallel rank 0 of the first pipeline stage.
    The others move blocks in the same steps, but choose by their own heads and layers,
    so that their numbers may differ a little. One thread, the worker's own, writes.

    Args:
        instance_id: `VllmConfig.instance_id`.
        engine: Data-parallel index of the worker's engine core.
    """

    def __init__(self, instance_id: str, engine: int) -> None:
        self._engine = instance_id, engine
        self._values: memoryview | None = None

    def connect(self) -> bool:
        """Return whether moves count by now.

        The engine core makes its file when it is about to serve. What workers move
        before, in warm-up runs, is nobody's block.
        """
        if self._values is None:
            self._values = find_values(*self._engine)
        return self._values is not None

    def add(self, num_blocks: int) -> None:
        """Count more blocks, or none of them before `connect` would succeed."""
        if num_blocks and self.connect():
            assert self._values is not None
            self._values[MOVED] += num_blocks


def get_metrics(llm: LLM | LLMEngine | AsyncLLM) -> RocoMetrics:
    """Return what the budget did so far in the engines of `llm`.

    Works with the engine core in this process and in processes of its own, with and
    without `disable_log_stats`.

    Args:
        llm: An `LLM`, or the `LLMEngine` or `AsyncLLM` itself, in the process that
            created it.

    Raises:
        RuntimeError: No engine of `llm` publishes: another attention backend is in
            use, or the engine has been shut down.
    """
    engine: Any = getattr(llm, "llm_engine", llm)
    instance_id = engine.vllm_config.instance_id
    engines = read_engines(instance_id)
    if not engines:
        backend = engine.vllm_config.attention_config.backend
        raise RuntimeError(
            f"roco: no running engine of vLLM instance {instance_id} publishes "
            f"metrics. Its attention backend is {getattr(backend, 'name', backend)}; "
            "the metrics exist while an engine with attention_backend='ROCO' runs "
            "that was started from this process."
        )
    return RocoMetrics(engines=engines)


def read_engines(instance_id: str | None = None) -> tuple[EngineMetrics, ...]:
    """Return the numbers of the live engine cores that this process started.

    Args:
        instance_id: Only the engines of this vLLM instance; None for all of them.

    Returns:
        One entry per engine core, by engine index.
    """
    engines = [
        EngineMetrics(
            engine=identity.engine,
            model_name=identity.model_name,
            budget_tokens=identity.budget_tokens,
            freed_blocks=values[FREED],
            moved_blocks=values[MOVED],
            max_sequence_kv_tokens=values[MAX],
            peak_sequence_kv_tokens=values[PEAK],
        )
        for identity, values in read_files()
        if identity.frontend_pid == os.getpid()
        and instance_id in (None, identity.instance_id)
    ]
    return tuple(sorted(engines, key=lambda metrics: metrics.engine))
