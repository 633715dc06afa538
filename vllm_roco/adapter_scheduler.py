# SPDX-License-Identifier: Apache-2.0
"""A vLLM scheduler that gives no running request's place for its adapter away.

A step has room for `--max-loras` adapters, and vLLM looks at those of the step's
requests alone. One that runs but is not chosen, as a prompt that waits for its turn to
be read, comes back with its adapter later: were there others in all places by then,
vLLM would end the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from vllm_roco.refusing_scheduler import RefusingScheduler

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class AdapterScheduler(RefusingScheduler):
    """Keeps adapters within their places; arguments as in the base class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # of the first so many requests that run, in the step being scheduled
        self._adapters: set[int] = set()
        self._num_seen = 0

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule as vLLM does, with a new look at who runs."""
        self._adapters.clear()
        self._num_seen = 0
        return super().schedule(*args, **kwargs)

    @override
    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Return whether a request may be let in: not if it lacks a place."""
        # vLLM first: it also ends requests whose grammar is bad
        is_ready = super()._handle_blocked_waiting_request(request)
        return is_ready and not self._lacks_place(request)

    def _lacks_place(self, request: Request) -> bool:
        """Return whether others' adapters are in all places, and not the request's."""
        if self.lora_config is None or request.lora_request is None:
            return False
        # while waiting requests are looked at, those that run only become more
        for running in self.running[self._num_seen :]:
            if running.lora_request is not None:
                self._adapters.add(running.lora_request.lora_int_id)
        self._num_seen = len(self.running)
        return (
            len(self._adapters) >= self.lora_config.max_loras
            and request.lora_request.lora_int_id not in self._adapters
        )
