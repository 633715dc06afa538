# SPDX-License-Identifier: Apache-2.0
"""The way to an engine over HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from tests.soak.clients import ADAPTER, SLEEP, Answer, Choice
from tests.soak.mix import Planned
from tests.soak.setups import MODEL_NAME


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
            "model": ADAPTER if planned.adapter else MODEL_NAME,
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

    async def disturb(self, how: str) -> None:
        """See `Client`; the server must be in vLLM's development mode."""
        if how == "reload":
            await self._post("/collective_rpc", {"method": "reload_weights"})
        elif how == "sleep":
            await self._post("/sleep?level=1&mode=keep")
            await asyncio.sleep(SLEEP)
            await self._post("/wake_up")
        else:
            running = str(how == "reset running").lower()
            await self._post(f"/reset_prefix_cache?reset_running_requests={running}")

    async def _post(self, path: str, body: object = None) -> None:
        answer = await self._client.post(self._url + path, json=body)
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
