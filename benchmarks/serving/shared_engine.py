# SPDX-License-Identifier: Apache-2.0
"""Lets several calls of vLLM's benchmarks share one engine, whose start takes longest.

Each benchmark asks `LLM.from_engine_args` for an engine of its own. Within the `with`
block below that returns the same one to all of them.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
from unittest.mock import patch

from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

END_SECONDS = 30


def await_engine_end() -> None:
    """Return when the engine's processes are gone: the next needs their memory."""
    if multiprocessing.active_children():
        # an engine ends when its handle is collected
        gc.collect()
    for process in multiprocessing.active_children():
        process.join(END_SECONDS)
        if process.is_alive():
            # it would share the GPU's memory with the next
            process.kill()
            process.join()


class SharedEngine:
    """The one engine of the benchmarks that run within the `with` block.

    The first of them starts it, so that a block without benchmarks costs nothing.
    """

    def __init__(self) -> None:
        self._llm: LLM | None = None
        self._settings: EngineArgs | None = None
        self._failure: str | None = None
        self._patch = patch.object(LLM, "from_engine_args", self._get)

    def __enter__(self) -> SharedEngine:
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()
        self.end()

    def end(self) -> None:
        """End the engine and forget its metrics; the next benchmark starts another."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        await_engine_end()
        unregister_vllm_metrics()

    def _get(self, settings: EngineArgs) -> LLM:
        """Return the engine.

        Args:
            settings: What a benchmark asks for.

        Raises:
            ValueError: The block's first benchmark asked for another engine.
            RuntimeError: The engine does not start, or has not done so before.
        """
        if self._settings is None:
            # vLLM fills in what it is given
            self._settings = copy.deepcopy(settings)
        elif settings != self._settings:
            asked, shared = vars(settings), vars(self._settings)
            other = [f"{k}={v!r}" for k, v in asked.items() if v != shared[k]]
            raise ValueError(f"the shared engine has another {', '.join(other)}")
        if self._failure is not None:
            raise RuntimeError(self._failure)
        if self._llm is None:
            try:
                self._llm = LLM(**vars(settings))
            except Exception as error:
                # another try would take as long and end the same
                self._failure = f"the engine does not start: {error!r}"
                raise RuntimeError(self._failure) from error
        return self._llm
