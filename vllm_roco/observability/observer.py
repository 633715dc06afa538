# SPDX-License-Identifier: Apache-2.0
"""What a scheduler tells of itself. No trouble of it reaches the scheduler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_roco.observability.publisher import MetricsPublisher
from vllm_roco.observability.trace import TraceWriter
from vllm_roco.observability.warning import warn_of_end

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_roco.observability.families import PrefixCounts


class Observer:
    """Publishes an engine core's numbers, and writes its trace if one is wanted.

    Nothing but the start raises. What fails later is switched off with a warning.

    Args:
        vllm_config: The engine core's configuration.
        budget_tokens: The option `budget`.
        trace: The option `trace`.

    Raises:
        ValueError: The trace cannot be written.
    """

    def __init__(
        self, vllm_config: VllmConfig, budget_tokens: int, trace: str | None
    ) -> None:
        engine = vllm_config.parallel_config.data_parallel_index
        self._trace = None if trace is None else TraceWriter(trace, engine)
        model_name = vllm_config.model_config.served_model_name
        # of several names the configuration keeps the first
        assert isinstance(model_name, str)
        self._publisher: MetricsPublisher | None = None
        try:
            self._publisher = MetricsPublisher(
                instance_id=vllm_config.instance_id,
                engine=engine,
                model_name=model_name,
                budget_tokens=budget_tokens,
            )
        except (OSError, ValueError) as error:
            self._end_metrics(error)

    def publish(self, freed_blocks: int, max_sequence_kv_tokens: int) -> None:
        """Show new numbers, see `MetricsPublisher.publish`."""
        if self._publisher is None:
            return
        try:
            self._publisher.publish(freed_blocks, max_sequence_kv_tokens)
        except (OSError, ValueError) as error:
            self._end_metrics(error)

    def count_request(self, bound_tokens: int) -> None:
        """Show one request more, see `MetricsPublisher.count_request`."""
        if self._publisher is not None:
            self._publisher.count_request(bound_tokens)

    def publish_prefixes(self, counts: PrefixCounts) -> None:
        """Show new numbers of the prefix cache."""
        if self._publisher is not None:
            self._publisher.publish_prefixes(counts)

    def record(
        self, step: int, requests: Iterable[tuple[str, int, int, int | None]]
    ) -> None:
        """Write a step into the trace.

        Args:
            step: The scheduler's step, counted from the start of the engine.
            requests: Of each scheduled request what `TraceWriter.write` takes. Not
                looked at where there is no trace.
        """
        if self._trace is None:
            return
        for request in requests:
            self._trace.write(step, *request)
        try:
            self._trace.flush()
        except (OSError, ValueError) as error:
            self._end_trace(error)

    def close(self) -> None:
        """Remove the metrics and close the trace. Closing twice is harmless."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None
        if self._trace is not None:
            try:
                self._trace.close()
            except (OSError, ValueError) as error:
                self._end_trace(error)
            self._trace = None

    def _end_metrics(self, error: Exception) -> None:
        self._publisher = None
        warn_of_end("publishing metrics", error)

    def _end_trace(self, error: Exception) -> None:
        self._trace = None
        warn_of_end("the trace", error)
