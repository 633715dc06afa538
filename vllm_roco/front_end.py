# SPDX-License-Identifier: Apache-2.0
"""Refuses a request where it arrives, so that its client alone gets an error.

Every front end of vLLM in Python makes its requests with one method, which is wrapped
here; over HTTP the error is a 400. The object that has it is made before an engine
starts, or as soon as it has, and sees its settings: what RoCo cannot serve ends there,
also where no layer would ever ask for it. The scheduler refuses by itself what comes
another way, but can only end the request.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine.input_processor import InputProcessor

from vllm_roco.request_options.error import RequestOptionError
from vllm_roco.request_options.planner import RequestPlanner
from vllm_roco.request_refusal import trouble_with_seed
from vllm_roco.request_size import RequestSizes, RequestTooLargeError
from vllm_roco.validation import is_selected, request_planner, validated_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest

_stock_init = InputProcessor.__init__
_stock_process_inputs = InputProcessor.process_inputs
_planners: WeakKeyDictionary[InputProcessor, RequestPlanner] = WeakKeyDictionary()


def check_requests() -> None:
    """Have requests of engines with RoCo layers checked in this process."""
    # another plugin may have wrapped ours since
    if InputProcessor.process_inputs is _stock_process_inputs:
        InputProcessor.process_inputs = _process_inputs  # type: ignore[method-assign]
    if InputProcessor.__init__ is _stock_init:
        InputProcessor.__init__ = _init  # type: ignore[method-assign]


@functools.wraps(_stock_init)
def _init(self: InputProcessor, *args: Any, **kwargs: Any) -> None:
    _stock_init(self, *args, **kwargs)
    if is_selected(self.vllm_config):
        # on CUDA for the first time; RoCo's own platform for CPUs has done so
        validated_config(self.vllm_config)


@functools.wraps(_stock_process_inputs)
def _process_inputs(
    self: InputProcessor, *args: Any, **kwargs: Any
) -> EngineCoreRequest:
    request = _stock_process_inputs(self, *args, **kwargs)
    if is_selected(self.vllm_config):
        _check(self, request)
    return request


def _check(processor: InputProcessor, request: EngineCoreRequest) -> None:
    """Raise if a request cannot be served; may run in several threads.

    Raises:
        VLLMValidationError: With the key that the client has used, if any.
    """
    params = request.sampling_params
    if current_platform.is_cpu() and (trouble := trouble_with_seed(params)) is not None:
        raise VLLMValidationError(trouble, parameter="seed")
    if params is None:
        return
    length = length_from_prompt_token_ids_or_embeds(
        request.prompt_token_ids, request.prompt_embeds
    )
    config = processor.vllm_config
    planner = _planner(processor)
    sizes = RequestSizes(
        planner.block_size,
        config.max_concurrent_batches,
        config.model_config.max_model_len,
    )
    # vLLM has put a number where there was none
    assert params.max_tokens is not None
    try:
        plan = planner.plan(params.extra_args, length)
        sizes.resolve(plan, length, params.max_tokens, _num_blocks(config))
    except (RequestOptionError, RequestTooLargeError) as error:
        raise VLLMValidationError(
            str(error), parameter=error.parameter, value=error.value
        ) from error


def _num_blocks(config: VllmConfig) -> int | None:
    """Return the most blocks that a request can have, None while nobody has told.

    Of a model with caches of several kinds it is less; the scheduler alone knows that.
    """
    # each engine says it when it is ready, and vLLM adds them up
    blocks = config.cache_config.num_gpu_blocks
    if not blocks:
        return None
    parallel = config.parallel_config
    engines = parallel.data_parallel_size
    if parallel.data_parallel_rank_local is not None:
        engines = 1
    elif parallel.local_engines_only:
        engines = parallel.data_parallel_size_local
    # one is vLLM's null block
    return blocks // engines - 1


def _planner(processor: InputProcessor) -> RequestPlanner:
    config = processor.vllm_config
    # the engine has told it by the time that there are requests
    block_size = config.cache_config.block_size
    planner = _planners.get(processor)
    if planner is None or planner.block_size != block_size:
        planner = _planners[processor] = request_planner(config, block_size)
    return planner
