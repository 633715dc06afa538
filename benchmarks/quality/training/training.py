# SPDX-License-Identifier: Apache-2.0
"""Train an adapter for as long as there is time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from benchmarks.quality.training import low_rank
from benchmarks.quality.training.supply import Batch, Supply

REPORT = "training.json"

_WARM_UP_STEPS = 30
_LEAST_RATE = 0.02
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Plan:
    """How an adapter is trained.

    Attributes:
        rank: Of the adapters.
        rate: Largest learning rate of AdamW.
        time_limit: Seconds of training, evaluations included.
        steps: Most steps; 0 for as many as there is time for.
        evaluate_every: Steps between two evaluations.
        target: Ends the training early when every task is solved as well.
        log_every: Seconds between two lines.
    """

    rank: int
    rate: float
    time_limit: float
    steps: int = 0
    evaluate_every: int = 250
    target: float = 1.0
    log_every: float = 10.0

    def progress(self, step: int, seconds: float) -> float:
        """Return how much of the training is done, 0 to 1."""
        of_steps = step / self.steps if self.steps else 0.0
        return min(1.0, max(of_steps, seconds / self.time_limit))

    def rate_at(self, step: int, progress: float) -> float:
        """Return the learning rate: a short rise, then half a cosine."""
        rise = min(1.0, (step + 1) / _WARM_UP_STEPS)
        fall = _LEAST_RATE + (1 - _LEAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
        return self.rate * rise * fall


@dataclass
class Course:
    """What a training came to.

    Attributes:
        steps: Done.
        tokens: Read, padding among them.
        seconds: Taken, evaluations included.
        waited: Seconds in which no batch was ready.
        losses: Mean of the steps between two lines of the log.
        scores: Of each evaluation, by its step.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    losses: list[float] = field(default_factory=list)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    """Return the weighted mean loss in nats; only what counts is given logits."""
    device = model.device
    # chosen here, or the device would be waited for
    chosen = numpy.flatnonzero(batch.weights)
    weights, targets, before = (
        torch.from_numpy(values).to(device)
        for values in (
            batch.weights.flat[chosen],
            batch.token_ids.flat[chosen].astype(numpy.int64),
            # nothing predicts a row's first token, which counts for nothing
            chosen - 1,
        )
    )
    ids = torch.from_numpy(batch.token_ids).to(device, torch.int64)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[before]).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def train(
    model: Any,
    supply: Supply,
    plan: Plan,
    evaluate: Callable[[], dict[str, float]],
    say: Callable[[str], None] = print,
    start: Path | None = None,
) -> Course:
    """Train adapters, which the model gets here.

    Args:
        model: Hugging Face decoder.
        supply: Of batches.
        plan: How.
        evaluate: Returns the score of each task.
        say: Takes the lines of the log.
        start: Folder of adapters that the training goes on from.
    """
    parameters = low_rank.attach(model, plan.rank)
    if start:
        low_rank.restore(model, start)
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    course = Course()
    begin = told = time.monotonic()
    since: list[torch.Tensor] = []
    told_tokens = 0
    while (progress := plan.progress(course.steps, time.monotonic() - begin)) < 1:
        waiting = time.monotonic()
        batch = supply.take(progress)
        course.waited += time.monotonic() - waiting
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(course.steps, progress)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        since.append(loss.detach())
        course.steps += 1
        course.tokens += batch.token_ids.size
        now = time.monotonic()
        if now - told >= plan.log_every:
            course.losses.append(round(float(torch.stack(since).mean()), 4))
            pace = (course.tokens - told_tokens) / (now - told)
            say(
                f"{now - begin:6.0f} s  step {course.steps}  loss {course.losses[-1]}  "
                f"{pace:,.0f} tokens/s  waited {course.waited:.1f} s  {progress:.0%}"
            )
            told, told_tokens, since = now, course.tokens, []
        if course.steps % plan.evaluate_every == 0:
            course.scores[course.steps] = scores = evaluated(model, evaluate)
            say(f"step {course.steps}: {json.dumps(scores)}")
            told, told_tokens = time.monotonic(), course.tokens
            if min(scores.values(), default=0) >= plan.target:
                break
    if since:
        course.losses.append(round(float(torch.stack(since).mean()), 4))
    course.seconds = round(time.monotonic() - begin, 1)
    return course


def evaluated(model: Any, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return scores; weights and adapters are added once for all of them."""
    with parametrize.cached():
        return evaluate()


def write_report(
    folder: Path, plan: Plan, course: Course, facts: dict[str, Any]
) -> None:
    """Write what was done and what came of it, beside the adapter."""
    report = {**facts, "plan": asdict(plan), "course": asdict(course)}
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
