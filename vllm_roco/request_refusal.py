# SPDX-License-Identifier: Apache-2.0
"""Which requests are refused, each alone and with a reason; the engine goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request


def trouble_with(request: Request) -> str | None:
    """Return why eviction cannot serve a request, None if it can."""
    from vllm.platforms import current_platform

    if request.resumable:
        return (
            "roco: streamed input is not supported, because a request's computed "
            "length would go back to where eviction has already been. Send the whole "
            "prompt at once, or use another --attention-backend."
        )
    if current_platform.is_cpu():
        return trouble_with_seed(request.sampling_params)
    return None


def trouble_with_seed(params: SamplingParams | PoolingParams | None) -> str | None:
    """Return why a CPU cannot serve a request, None if it can.

    Where a prompt is read in chunks, vLLM rewinds a request's own random generator
    after each, which PyTorch's generators for CPUs cannot do: the engine would stop.

    Args:
        params: Of the request.
    """
    from vllm.sampling_params import SamplingParams, SamplingType

    if (
        not isinstance(params, SamplingParams)
        or params.sampling_type != SamplingType.RANDOM_SEED
    ):
        return None
    return (
        f"roco: seed = {params.seed} with temperature = {params.temperature:g} is not "
        "supported on a CPU, where vLLM cannot read a prompt in chunks for a request "
        "with a seed of its own. Leave seed out, use temperature 0, or start the "
        "engine with --seed."
    )
