# SPDX-License-Identifier: Apache-2.0
"""The way to an engine through vLLM's own client, in this process."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from tests.soak.clients import SLEEP, Answer, Choice
from tests.soak.mix import Planned


class InProcessClient:
    """Talks to vLLM's asynchronous client, without a server.

    Args:
        engine: Of this process; its engine core may live in another one.
        sleep_level: 1 where weights and caches can leave the device, else 0.
        adapter: What requests with a LoRA adapter bring.
    """

    def __init__(
        self,
        engine: AsyncLLM,
        sleep_level: int = 1,
        adapter: LoRARequest | None = None,
    ) -> None:
        self._engine = engine
        self._sleep_level = sleep_level
        self._adapter = adapter
        self._num_sent = 0

    async def send(self, planned: Planned) -> Answer:
        """See `Client`."""
        self._num_sent += 1
        sampling = dict(planned.sampling)
        form = sampling.pop("structured_outputs", None)
        if form is not None:
            sampling["structured_outputs"] = StructuredOutputsParams(**form)
        streamed = planned.leave_after is not None
        kind = RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY
        prompt: Any = {"prompt_token_ids": list(planned.prompt)}
        if planned.salt:
            prompt["cache_salt"] = planned.salt
        received = 0
        output = None
        try:
            params = SamplingParams(
                **sampling, output_kind=kind, extra_args=dict(planned.options)
            )
            async with asyncio.timeout(planned.leave_at):
                stream = self._engine.generate(
                    *(prompt, params, f"r{self._num_sent}"),
                    lora_request=self._adapter if planned.adapter else None,
                )
                async with contextlib.aclosing(stream):
                    async for output in stream:
                        received += sum(len(each.token_ids) for each in output.outputs)
                        if streamed and received >= planned.leave_after:
                            break
        except TimeoutError:
            return Answer(0)
        except (VLLMValidationError, ValueError) as error:
            return Answer(400, error=str(error))
        # of a dead engine, too
        except Exception as error:
            return Answer(500, error=repr(error))
        if streamed:
            return Answer(0)
        assert output is not None
        return _from_output(output)

    async def disturb(self, how: str) -> None:
        """See `Client`."""
        engine = self._engine
        if how == "reload":
            await engine.collective_rpc("reload_weights")
        elif how == "sleep":
            await engine.sleep(self._sleep_level, "keep")
            await asyncio.sleep(SLEEP)
            await engine.wake_up(None if self._sleep_level else ["scheduling"])
        else:
            await engine.reset_prefix_cache(how == "reset running")


def _from_output(output: Any) -> Answer:
    choices = []
    for each in output.outputs:
        choice = Choice(list(each.token_ids), each.finish_reason, each.text)
        if each.logprobs is not None:
            places = zip(each.token_ids, each.logprobs, strict=True)
            choice.logprobs = [place[token].logprob for token, place in places]
            choice.candidates = [
                {token: value.logprob for token, value in place.items()}
                for place in each.logprobs
            ]
        choices.append(choice)
    number = None
    if output.prompt_logprobs is not None:
        number = sum(map(bool, output.prompt_logprobs))
    return Answer(200, choices, num_prompt_logprobs=number)
