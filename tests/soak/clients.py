# SPDX-License-Identifier: Apache-2.0
"""Two ways to an engine: over HTTP, and through vLLM's own client in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from tests.soak.mix import Planned
from tests.soak.setups import MODEL_NAME

TIE_CANDIDATES = 5


@dataclass
class Choice:
    """One of the answers to a request.

    Attributes:
        tokens: Token ids.
        reason: Why it ended.
        text: The same in words.
        logprobs: Of its tokens, where they were asked for.
        candidates: Of each place the likeliest tokens with their log probability, where
            canaries ask for them.
    """

    tokens: list[int]
    reason: str | None
    text: str = ""
    logprobs: list[float] | None = None
    candidates: list[dict[int, float]] = field(default_factory=list)


@dataclass
class Answer:
    """What a client has received.

    Attributes:
        status: As HTTP has it; 0 if the client has gone away.
        choices: Complete answers.
        error: What was said, for other statuses than 200.
        num_prompt_logprobs: Places of the prompt with a log probability.
    """

    status: int
    choices: list[Choice] = field(default_factory=list)
    error: str = ""
    num_prompt_logprobs: int | None = None


class Client(Protocol):
    """What a soak needs of an engine."""

    async def send(self, planned: Planned) -> Answer:
        """Send a request and do with it what is planned."""

    async def reset_prefix_cache(self) -> None:
        """Let the engine forget all prefixes."""


class HttpClient:
    """Talks to a server.

    Args:
        url: Where it listens.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(timeout=600, limits=limits)

    async def send(self, planned: Planned) -> Answer:
        """See `Client`."""
        body: dict[str, Any] = {
            "model": MODEL_NAME,
            "prompt": list(planned.prompt),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **planned.sampling,
        }
        if planned.options:
            body["vllm_xargs"] = planned.options
        if planned.salt:
            body["cache_salt"] = planned.salt
        if planned.leave_after is not None:
            return await self._read_some(body, planned.leave_after)
        try:
            async with asyncio.timeout(planned.leave_at):
                answer = await self._client.post(
                    f"{self._url}/v1/completions", json=body
                )
        except TimeoutError:
            return Answer(0)
        if answer.status_code != 200:
            return Answer(answer.status_code, error=answer.text)
        return _from_json(answer.json())

    async def _read_some(self, body: dict[str, Any], num_tokens: int) -> Answer:
        """Read a stream, and close its connection in the middle."""
        received = 0
        async with self._client.stream(
            "POST", f"{self._url}/v1/completions", json=body | {"stream": True}
        ) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return Answer(answer.status_code, error=answer.text)
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ")
                if not data.startswith("{"):
                    continue
                event = json.loads(data)
                if "error" in event:
                    # vLLM has sent the status by then
                    return Answer(int(event["error"]["code"]), error=data)
                for choice in event["choices"]:
                    received += len(choice.get("token_ids") or ())
                if received >= num_tokens:
                    break
        return Answer(0)

    async def reset_prefix_cache(self) -> None:
        """See `Client`; the server must be in vLLM's development mode."""
        answer = await self._client.post(f"{self._url}/reset_prefix_cache")
        answer.raise_for_status()

    async def close(self) -> None:
        """Close what connections there are."""
        await self._client.aclose()


def _from_json(answer: dict[str, Any]) -> Answer:
    choices = []
    num_prompt_logprobs = None
    for choice in answer["choices"]:
        logprobs = choice.get("logprobs")
        got = Choice(choice["token_ids"], choice["finish_reason"], choice["text"])
        if logprobs is not None:
            got.logprobs = logprobs["token_logprobs"]
            got.candidates = [
                {
                    int(name.removeprefix("token_id:")): value
                    for name, value in place.items()
                }
                for place in logprobs["top_logprobs"] or ()
                if place
            ]
        choices.append(got)
        if choice.get("prompt_logprobs") is not None:
            num_prompt_logprobs = sum(map(bool, choice["prompt_logprobs"]))
    return Answer(200, choices, num_prompt_logprobs=num_prompt_logprobs)


class InProcessClient:
    """Talks to vLLM's asynchronous client, without a server.

    Args:
        engine: Of this process; its engine core may live in another one.
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
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
                stream = self._engine.generate(prompt, params, f"r{self._num_sent}")
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

    async def reset_prefix_cache(self) -> None:
        """See `Client`."""
        await self._engine.reset_prefix_cache()


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
