# SPDX-License-Identifier: Apache-2.0
"""An engine core that does nothing but publish, also as a process of its own.

A spawned process imports this module alone, and vLLM takes seconds to import.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

from vllm_roco.observability.metrics import MetricsPublisher, MovedBlocks
from vllm_roco.observability.prometheus import MultiprocessPublisher


def publisher(
    kind: type[MetricsPublisher] = MetricsPublisher,
    *,
    engine: int = 0,
    model_name: str = "m",
) -> MetricsPublisher:
    return kind(instance_id="1", engine=engine, model_name=model_name, budget_tokens=64)


def run_engine(engine: int, connection: Connection) -> None:
    """Publish growing numbers, as an engine core of several API servers does."""
    owned = publisher(MultiprocessPublisher, engine=engine)
    moved_blocks = MovedBlocks("1", engine)
    while (freed_blocks := connection.recv()) is not None:
        owned.publish(freed_blocks, 16 * freed_blocks)
        moved_blocks.add(1)
        owned.publish(freed_blocks, 0)
        connection.send(True)
    owned.close()
