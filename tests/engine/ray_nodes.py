# SPDX-License-Identifier: Apache-2.0
"""Two nodes of Ray on one machine, whose devices are made up.

vLLM places a worker on each device that Ray knows, and its CPU platform has none. So a
node says that it has one, and the platform calls it as Ray does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_roco.cpu_platform import RocoCpuPlatform

NUM_NODES = 2
ROOT = Path(__file__).parents[2]


def have_devices() -> None:
    """Let vLLM find a node's devices; runs first in every worker."""
    # a class of vLLM's says that there are none
    platform: Any = RocoCpuPlatform
    platform.ray_device_key = "GPU"


def node_of(worker: Any) -> str:
    """Return on which node a worker runs; it runs there."""
    import ray  # noqa: PLC0415 -- not everywhere

    name: str = ray.get_runtime_context().get_node_id()
    return name


@contextlib.contextmanager
def running_nodes() -> Iterator[None]:
    """Run two nodes with a device each, and be connected to the first."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patch:
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, path)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # a parent's answer, which a worker is to find itself
        patch.setattr(RocoCpuPlatform, "ray_device_key", "GPU")
        node: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1}
        cluster = cluster_utils.Cluster(
            initialize_head=True, head_node_args={**node, "include_dashboard": False}
        )
        try:
            for _ in range(NUM_NODES - 1):
                cluster.add_node(**node)
            ray.init(
                address=cluster.address,
                log_to_driver=False,
                runtime_env={
                    "worker_process_setup_hook": f"{__name__}.{have_devices.__name__}"
                },
            )
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()
