# SPDX-License-Identifier: Apache-2.0
"""What an answer must be like, whoever else was served."""

from __future__ import annotations

import math
import re

from tests.soak.clients import Answer, Choice
from tests.soak.mix import Planned

TIE = 0.5
"""Nats between two tokens of which rounding to 16 bits may choose either."""


def faults_of(planned: Planned, answer: Answer) -> list[str]:
    """Return what is wrong with an answer, in words.

    Args:
        planned: The request.
        answer: What its client has received.
    """
    if answer.status == 0:
        return [] if planned.leaves else ["the client was left alone"]
    if "Traceback" in answer.error:
        return [f"the client gets a stack trace: {answer.error[:1000]}"]
    if planned.is_refused:
        if answer.status == 400:
            return []
        return [f"status {answer.status} instead of 400: {answer.error[:300]}"]
    if answer.status != 200:
        return [f"status {answer.status}: {answer.error[:300]}"]
    sampling = planned.sampling
    faults = []
    if len(answer.choices) != sampling.get("n", 1):
        faults.append(f"{len(answer.choices)} answers")
    wanted = sampling.get("prompt_logprobs") is not None
    number = len(planned.prompt) - 1 if wanted else None
    if wanted and answer.num_prompt_logprobs != number:
        faults.append(
            f"{answer.num_prompt_logprobs} log probabilities of a prompt, not {number}"
        )
    for choice in answer.choices:
        faults += _faults_of_choice(planned, choice)
    return faults


def _faults_of_choice(planned: Planned, choice: Choice) -> list[str]:
    sampling, faults = planned.sampling, []
    number, most = len(choice.tokens), sampling["max_tokens"]
    if choice.reason not in ("length", "stop"):
        faults.append(f"it ended for {choice.reason!r}")
    if number > most or (choice.reason == "length" and number != most):
        faults.append(f"{number} tokens of {most}")
    if number < sampling.get("min_tokens", 0):
        faults.append(f"{number} tokens, fewer than min_tokens")
    if "logprobs" in sampling:
        logprobs = choice.logprobs or []
        if len(logprobs) != number:
            faults.append(f"{len(logprobs)} log probabilities of {number} tokens")
        if not all(value is not None and math.isfinite(value) for value in logprobs):
            faults.append("a log probability is not a number")
    if choice.reason == "stop":
        form = sampling.get("structured_outputs", {})
        if "choice" in form and choice.text not in form["choice"]:
            faults.append(f"{choice.text!r} is none of {form['choice']}")
        if "regex" in form and not re.fullmatch(form["regex"], choice.text):
            faults.append(f"{choice.text!r} is not of the form {form['regex']}")
        early = "min_tokens" in sampling
        for word in () if early else sampling.get("stop", ()):
            if word in choice.text:
                faults.append(f"{choice.text!r} goes on behind {word!r}")
    return faults


def first_difference(crowd: Choice, alone: Choice) -> int | None:
    """Return the place of the first token that differs, None where there is none."""
    pairs = zip(crowd.tokens, alone.tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def differs_from_alone(crowd: Choice, alone: Choice, *, exact: bool) -> str | None:
    """Return how a canary's answer differs from that of the same request alone.

    Args:
        crowd: The answer among others.
        alone: The answer alone, with candidates unless `exact`.
        exact: Whether token for token, as in float32. If not, the first token that
            differs must be as good as a tie alone: rounding chose, and what follows is
            another text.
    """
    if crowd.tokens == alone.tokens:
        return None
    place = first_difference(crowd, alone)
    if place is None:
        return f"{len(crowd.tokens)} tokens, alone {len(alone.tokens)}"
    got, expected = crowd.tokens[place], alone.tokens[place]
    if exact:
        return f"token {place} is {got}, alone {expected}"
    candidates = alone.candidates[place]
    if got not in candidates:
        return f"token {place} is {got}, which alone is not among {candidates}"
    behind = candidates[expected] - candidates[got]
    if behind > TIE:
        return f"token {place} is {got}, which alone is {behind:.2f} nats behind"
    return None
