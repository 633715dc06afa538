# SPDX-License-Identifier: Apache-2.0
"""A vLLM scheduler that answers a request it cannot serve with an error of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override
from vllm.logger import init_logger
from vllm.outputs import RequestError
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from vllm_roco.request_refusal import trouble_with

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")


class RefusingScheduler(Scheduler):
    """Refuses requests alone, see `request_refusal`; arguments as in the base class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # each with the reason
        self._refused: list[tuple[Request, str]] = []
        self._refused_streams: set[str] = set()

    @override
    def add_request(self, request: Request) -> None:
        """Take a request, or refuse it alone if eviction cannot serve it."""
        request_id = request.request_id
        if request_id in self._refused_streams and not request.resumable:
            # vLLM ends a stream with a request, which would be generated for nobody
            self._refused_streams.discard(request_id)
            return
        trouble = self._trouble_with(request)
        super().add_request(request)
        if trouble is None:
            return
        if request_id not in self._refused_streams:
            logger.error("%s Request %s is refused.", trouble, request_id)
        self.finish_requests(request_id, RequestStatus.FINISHED_ERROR)
        if request.resumable:
            self._refused_streams.add(request_id)
        self._refused.append((request, trouble))

    def _trouble_with(self, request: Request) -> str | None:
        """Return why a request that is about to be taken cannot be served, or None."""
        return trouble_with(request)

    @override
    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """Finish as vLLM does, and forget refused streams that were given up."""
        if request_ids is not None:
            if isinstance(request_ids, str):
                request_ids = (request_ids,)
            request_ids = set(request_ids)
            self._refused_streams -= request_ids
        return super().finish_requests(request_ids, finished_status)

    @override
    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Update as vLLM does, and answer refused requests."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request, trouble in self._refused:
            client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    **_reason(trouble),
                )
            )
        self._refused.clear()
        return outputs


def _reason(message: str) -> dict[str, Any]:
    """Return what an engine's answer to a refused request says beside its end.

    Args:
        message: Why it is refused.

    Returns:
        Arguments of `EngineCoreOutput`. From vLLM 0.33 on there is one for an error,
        which `AsyncLLM` raises and which is an HTTP 400; before, there is none.
    """
    if "error" not in EngineCoreOutput.__struct_fields__:
        return {}
    return {"error": RequestError(code="validation_error", message=message)}
