# SPDX-License-Identifier: Apache-2.0
"""What the layout of a launch depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.runtime import driver


@dataclass(frozen=True)
class Device:
    """A CUDA device, as far as launches are fitted to it.

    Attributes:
        num_multiprocessors: Its multiprocessors.
        capability: Its compute capability.
        shared_memory: Bytes of shared memory that one program may take.
    """

    num_multiprocessors: int
    capability: tuple[int, int]
    shared_memory: int

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """Ask a device."""
        index = torch.cuda.current_device() if device.index is None else device.index
        properties = torch.cuda.get_device_properties(index)
        limits = driver.active.utils.get_device_properties(index)
        return cls(
            num_multiprocessors=properties.multi_processor_count,
            capability=(properties.major, properties.minor),
            shared_memory=limits["max_shared_mem"],
        )


H100 = Device(num_multiprocessors=132, capability=(9, 0), shared_memory=227 * 1024)
"""What the launches were tuned on."""
