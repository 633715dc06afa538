# SPDX-License-Identifier: Apache-2.0
"""An engine core that does nothing but publish, also as a process of its own.

A spawned process imports this module alone, and vLLM takes seconds to import.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

from vllm_roco.observability.families import (
    REQUEST_BOUND,
    Distribution,
    PrefixCounts,
)
from vllm_roco.observability.publisher import MetricsPublisher, MovedBlocks

NUM_PREFIX_COUNTS = len(PrefixCounts._fields)


def publisher(engine: int = 0, instance_id: str = "1") -> MetricsPublisher:
    return MetricsPublisher(
        instance_id=instance_id, engine=engine, model_name="m", budget_tokens=64
    )


def prefix_counts(number: int) -> PrefixCounts:
    """Return counts that are all different, and each larger for a larger number."""
    return PrefixCounts(*(number * (place + 1) for place in range(NUM_PREFIX_COUNTS)))


def distribution(*sizes: int) -> Distribution:
    """Return what requests of such bounds come to."""
    lower = (-1, *REQUEST_BOUND.bounds)
    upper = (*REQUEST_BOUND.bounds, 2**63)
    return Distribution(
        tuple(
            sum(least < size <= most for size in sizes)
            for least, most in zip(lower, upper, strict=True)
        ),
        sum(sizes),
    )


def run_engine(engine: int, connection: Connection) -> None:
    """Publish growing numbers, as an engine core of several API servers does."""
    owned = publisher(engine)
    moved_blocks = MovedBlocks("1", engine)
    while (freed_blocks := connection.recv()) is not None:
        owned.publish(freed_blocks, 16 * freed_blocks)
        owned.publish_prefixes(prefix_counts(freed_blocks))
        owned.count_request(16 * freed_blocks)
        moved_blocks.add(1)
        owned.publish(freed_blocks, 0)
        connection.send(True)
    owned.close()
