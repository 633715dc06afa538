# SPDX-License-Identifier: Apache-2.0
"""The ranks that share a layer's heads, and how they come to choose alike.

A block is kept if any head of any layer needs it, and each rank knows its own heads
alone. So ranks tell each other what their heads need at most, once a step for all
layers, and each takes the largest: as a maximum rounds nothing, and heads are whole on
a rank, it is what one GPU with all of the heads would find.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.distributed.parallel_state import get_tp_group

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.parallel_state import GroupCoordinator

    from vllm_roco.config import RocoConfig


def num_agreeing_ranks(vllm_config: VllmConfig, config: RocoConfig) -> int:
    """Return how many ranks choose together; 1 where each chooses by itself.

    Args:
        vllm_config: The worker's configuration.
        config: The plugin's options.
    """
    # by age, every rank chooses the same anyway
    agrees = config.agree and config.measures
    return vllm_config.parallel_config.tensor_parallel_size if agrees else 1


def tensor_ranks(vllm_config: VllmConfig, config: RocoConfig) -> TensorRanks | None:
    """Return the ranks that this one chooses with; None if it chooses by itself.

    Args:
        vllm_config: The worker's configuration; its groups of ranks are there.
        config: The plugin's options.
    """
    if num_agreeing_ranks(vllm_config, config) == 1:
        return None
    return TensorRanks(get_tp_group())


class TensorRanks:
    """Exchanges numbers with all ranks of a group; each must take part every time.

    Args:
        group: vLLM's group of the ranks that share a layer's heads.
    """

    def __init__(self, group: GroupCoordinator) -> None:
        self._group = group

    def __len__(self) -> int:
        return self._group.world_size

    @property
    def own(self) -> int:
        """This rank's place among them."""
        return self._group.rank_in_group

    def gather(self, numbers: torch.Tensor) -> None:
        """Write into every rank's copy what each rank has in its own place.

        It neither waits for the device nor allocates, so a CUDA graph may hold it.

        Args:
            numbers: `[num_ranks, ...]` contiguous, of one shape on all ranks; what this
                rank has is at `own`.
        """
        group = self._group
        # vLLM's own NCCL, which its graphs hold; there is none on CPUs
        nccl = getattr(group.device_communicator, "pynccl_comm", None)
        own = numbers[self.own].view(-1)
        if nccl is None or nccl.disabled:
            torch.distributed.all_gather_into_tensor(
                numbers.view(-1), own, group=group.device_group
            )
        else:
            nccl.all_gather(numbers, own)

    def most(self, values: torch.Tensor) -> torch.Tensor:
        """Return the largest that any rank has of each number; allocates.

        Args:
            values: Of one shape on all ranks.

        Returns:
            Shaped like `values`, the same on all ranks.
        """
        numbers = values.new_empty((len(self), *values.shape))
        numbers[self.own] = values
        self.gather(numbers)
        return numbers.amax(0)
