# SPDX-License-Identifier: Apache-2.0
"""Which scheduler class an engine core runs: one that ends steps where RoCo evicts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULER = "vllm_roco.scheduler.RocoScheduler"
ASYNC_SCHEDULER = "vllm_roco.scheduler.RocoAsyncScheduler"


def use_roco_scheduler(vllm_config: VllmConfig) -> None:
    """Put the scheduler in place that ends prompt chunks where RoCo needs it.

    The memory bound that vLLM plans with holds only under this scheduler, and kept
    blocks would depend on who else is in the batch without it.

    Args:
        vllm_config: The engine core's configuration, before the scheduler is built.

    Raises:
        ValueError: The user chose a scheduler class without `RocoSchedulerMixin`.
    """
    scheduler_config = vllm_config.scheduler_config
    if scheduler_config.scheduler_cls is None:
        scheduler_config.scheduler_cls = (
            ASYNC_SCHEDULER if scheduler_config.async_scheduling else SCHEDULER
        )
    check_scheduler_class(vllm_config)


def check_scheduler_class(vllm_config: VllmConfig) -> None:
    """Refuse a scheduler class that does not end prompt chunks where RoCo evicts.

    Raises:
        ValueError: The user chose a scheduler class without `RocoSchedulerMixin`.
    """
    scheduler_config = vllm_config.scheduler_config
    chosen = scheduler_config.get_scheduler_cls()
    if not getattr(chosen, "ends_roco_chunks", False):
        raise ValueError(
            f"roco: scheduler_cls = {scheduler_config.scheduler_cls!r} does not end "
            "prompt chunks where RoCo evicts. Leave --scheduler-cls out, or derive "
            "your class from vllm_roco.scheduler.RocoSchedulerMixin."
        )
