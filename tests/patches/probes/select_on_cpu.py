# SPDX-License-Identifier: Apache-2.0
"""Prints which backend the CPU platform picks, by the backend that is selected."""

import json

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig


class ProbeBackend(CPUAttentionBackend):
    """A backend as a plugin would register it."""


def select(member: AttentionBackendEnum | None, head_size: int) -> str:
    """Return the path of the class that is picked, or why none is."""
    layer = AttentionSelectorConfig(head_size, torch.bfloat16, "auto", 32)
    try:
        return CpuPlatform.get_attn_backend_cls(member, layer)
    except ValueError as error:
        return str(error)


register_backend("PROBE", "__main__.ProbeBackend")
probe = AttentionBackendEnum["PROBE"]
print(
    json.dumps(
        {
            "unset": select(None, 64),
            "PROBE": select(probe, 64),
            "PROBE, head size 33": select(probe, 33),
        }
    )
)
