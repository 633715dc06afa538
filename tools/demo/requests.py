# SPDX-License-Identifier: Apache-2.0
"""What the demo asks, and how: a hidden number, twice, and long texts to write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from openai import APIError, AsyncOpenAI

from tools.demo import DemoError
from tools.demo.options import Options
from tools.passkey import Passkey, build_passkey

_LICENSE = Path(__file__).parents[2] / "LICENSE"
_DEPTH = 0.35
_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        name: What the table and the picture call it.
        token_ids: The prompt.
        max_tokens: Tokens to write.
        budget: KV tokens that it may keep.
        passkey: What it has to find; None for a free text.
    """

    name: str
    token_ids: list[int]
    max_tokens: int
    budget: int
    passkey: Passkey | None = None


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt.

    Attributes:
        prompt: The prompt.
        request_id: The server's name of the request.
        text: What was written.
        tokens_read: Tokens of the prompt, as the server counts them.
        tokens_written: Tokens of the answer, likewise.
        first_token_seconds: From sending to the first token.
        seconds: From sending to the last token.
    """

    prompt: Prompt
    request_id: str
    text: str
    tokens_read: int
    tokens_written: int
    first_token_seconds: float
    seconds: float


def build_prompts(model: str, options: Options) -> list[list[Prompt]]:
    """Return what is sent, those of a list at once, as the tokenizer encodes it.

    First a short one, so that what the server compiles on first use is not timed; then
    a question about a number that is hidden in a long text, and another one about the
    same text, which is in the prefix cache by then; then generations, which continue
    pieces of the project's license that are as long as half of the budget. Every second
    of them asks for a budget of its own, just that half.

    Raises:
        DemoError: The prompt is too short for the passkey task, or the model's
            tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        passkey = build_passkey(
            tokenizer, num_tokens=options.prompt_tokens, depth=_DEPTH, seed=0
        )
    except (OSError, ValueError) as error:
        raise DemoError(str(error)) from error
    text = tokenizer(_LICENSE.read_text(encoding="utf-8"))["input_ids"]
    budget, half = options.roco.budget, options.half_budget
    questions = [
        Prompt(f"question {number}", asked.token_ids, _ANSWER_TOKENS, budget, asked)
        for number, asked in enumerate((passkey, passkey.asked_again(tokenizer)), 1)
    ]
    generations = [
        # no two begin alike, so that none finds another's blocks in the prefix cache
        Prompt(
            f"generation {number}",
            text[number : number + half],
            options.tokens,
            budget if number % 2 else half,
        )
        for number in range(1, options.generations + 1)
    ]
    return [
        [Prompt("warm-up", text[-32:], 4, budget)],
        *([question] for question in questions),
        generations,
    ]


def ask(
    url: str, model: str, prompts: Sequence[Prompt], on_token: Callable[[Prompt], None]
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
        extra_body={
            "ignore_eos": prompt.passkey is None,
            "vllm_xargs": {"roco_budget": prompt.budget},
        },
    )
    text, arrivals = "", []
    request_id, usage = "", None
    async for part in stream:
        request_id, usage = part.id, part.usage or usage
        if part.choices:
            text += part.choices[0].text
            arrivals.append(time.perf_counter())
            on_token(prompt)
    if usage is None or not arrivals:
        raise DemoError(f"the answer to {prompt.name} broke off.")
    return Answer(
        prompt=prompt,
        request_id=request_id,
        text=text,
        tokens_read=usage.prompt_tokens,
        tokens_written=usage.completion_tokens,
        first_token_seconds=arrivals[0] - begin,
        seconds=arrivals[-1] - begin,
    )
