# SPDX-License-Identifier: Apache-2.0
"""What clients of a soak send and receive, whichever way they take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from tests.soak.mix import Planned

DISTURBANCES = ("reset", "reset running", "sleep", "reload")
"""What happens to an engine in mid-traffic.

The prefix cache is emptied; so it is while all that runs is preempted; the engine goes
to sleep with its requests and wakes up; its weights are loaded again.
"""

ADAPTER = "adapter"
"""Name of the LoRA adapter of requests that have one."""

SLEEP = 0.5
"""Seconds."""

TIE_CANDIDATES = 5
"""Likeliest tokens that canaries ask for where rounding may choose."""


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

    async def disturb(self, how: str) -> None:
        """Do one of `DISTURBANCES`."""
