# SPDX-License-Identifier: Apache-2.0
"""Sends the prompts through the OpenAI client and streams the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openai import APIError, AsyncOpenAI

from tools.demo.errors import DemoError
from tools.demo.prompts import Prompt


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt.

    Attributes:
        prompt: The prompt.
        request_id: The server's name of the request.
        text: What was written.
        tokens_read: Tokens of the prompt, as the server counts them.
        tokens_written: Tokens of the answer, likewise.
        read_seconds: From sending to the first token.
        write_seconds: From the first token to the last.
    """

    prompt: Prompt
    request_id: str
    text: str
    tokens_read: int
    tokens_written: int
    read_seconds: float
    write_seconds: float

    @property
    def is_right(self) -> bool | None:
        """Whether the passkey was found; None where there was none to find."""
        passkey = self.prompt.passkey
        return None if passkey is None else passkey.is_answered_by(self.text)


def ask(
    url: str,
    model: str,
    prompts: Sequence[Prompt],
    on_token: Callable[[Prompt], None] = lambda prompt: None,
) -> list[Answer]:
    """Send all prompts at once and return the answers in the same order.

    Args:
        url: The server's address.
        model: The model's name on the server.
        prompts: What to send.
        on_token: Called with the prompt for every piece of its answer.

    Raises:
        DemoError: The server refused a prompt or stopped answering.
    """

    async def ask_all() -> list[Answer]:
        async with AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(
                *(_ask(client, model, prompt, on_token) for prompt in prompts)
            )

    try:
        return asyncio.run(ask_all())
    except APIError as error:
        raise DemoError(f"the server did not answer a prompt: {error}") from error


async def _ask(
    client: AsyncOpenAI,
    model: str,
    prompt: Prompt,
    on_token: Callable[[Prompt], None],
) -> Answer:
    begin = time.perf_counter()
    stream = await client.completions.create(
        model=model,
        prompt=prompt.token_ids,
        max_tokens=prompt.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        # a long text is to become long, whatever the model thinks
        extra_body={"ignore_eos": prompt.passkey is None},
    )
    pieces: list[str] = []
    request_id = ""
    usage = None
    first = last = begin
    async for part in stream:
        request_id = part.id
        usage = part.usage or usage
        if part.choices:
            last = time.perf_counter()
            if not pieces:
                first = last
            pieces.append(part.choices[0].text)
            on_token(prompt)
    if usage is None:
        raise DemoError(f"the answer to {prompt.name} broke off.")
    return Answer(
        prompt=prompt,
        request_id=request_id,
        text="".join(pieces),
        tokens_read=usage.prompt_tokens,
        tokens_written=usage.completion_tokens,
        read_seconds=first - begin,
        write_seconds=last - first,
    )
