# SPDX-License-Identifier: Apache-2.0
"""Requests of every kind, drawn from a seed; nothing here knows vLLM."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

FIRST_TOKEN = 1000
"""The first token that prompts are made of: those before it may mean something.

This one itself is a whole word of the tokenizers that soaks have.
"""

_NUM_HEADERS = 6
_LONGEST_HEADER = 384

GOOD_OPTIONS: tuple[dict[str, Any], ...] = (
    {"roco_budget": 64},
    {"roco_budget": 0.5},
    {"roco_budget": "full"},
    {"roco_mode": "full"},
    {"roco_mode": "prompt"},
    {"roco_mode": "auto"},
    {"roco_mode": "generation", "roco_budget": 64},
    {"roco_budget": 192, "roco_stride": 16, "roco_chunk": 128},
    {"roco_policy": "h2o", "roco_chunk": 32},
    {"roco_policy": "random", "roco_seed": 7},
    {"roco_shield": "deviation", "roco_shield_ratio": 0.3, "roco_sink": 0},
    {"roco": '{"budget": 96, "recent": 48}'},
)
BAD_OPTIONS: tuple[dict[str, Any], ...] = (
    {"roco_budget": 100},
    {"roco_budget": "64"},
    {"roco_budget": 1 << 20},
    {"roco_stride": -16},
    {"roco_chunk": 1.5},
    {"roco_mode": "none"},
    {"roco_buget": 64},
    {"roco_seed": 7},
    {"roco": "{"},
    {"roco_mode": "full", "roco_stride": 64},
)


@dataclass(frozen=True)
class Limits:
    """What the requests must fit.

    Attributes:
        max_model_len: Most tokens of a prompt and its answer.
        vocabulary: Tokens that there are.
        longest_kept_prompt: Of requests whose mode keeps the whole prompt.
        adapter: Whether there is a LoRA adapter.
    """

    max_model_len: int
    vocabulary: int
    longest_kept_prompt: int
    adapter: bool = False


@dataclass(frozen=True)
class Planned:
    """One request, and what becomes of it.

    Attributes:
        number: Its place in the crowd.
        traits: What is special about it.
        prompt: Token ids.
        sampling: Sampling parameters, in the words of vLLM's `SamplingParams`.
        options: Of RoCo, in the words of `vllm_xargs`.
        salt: vLLM's `cache_salt`.
        leave_after: Tokens of a stream after which its client goes away.
        leave_at: Seconds after which the client goes away, whatever it has.
        is_refused: Whether an error is the right answer.
        canary: Its number if its answer must be that of the same request alone.
        adapter: Whether the LoRA adapter answers.
    """

    number: int
    traits: tuple[str, ...]
    prompt: tuple[int, ...]
    sampling: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    salt: str | None = None
    leave_after: int | None = None
    leave_at: float | None = None
    is_refused: bool = False
    canary: int | None = None
    adapter: bool = False

    @property
    def leaves(self) -> bool:
        """Whether the client may go away before the answer is complete."""
        return self.leave_after is not None or self.leave_at is not None


def canaries(count: int, limits: Limits, when: str) -> list[Planned]:
    """Return requests whose answers depend on nobody else.

    Two of three have a salt of their own, because statistics of shared blocks count
    the queries of all: `docs/prefix-caching.md`, "What a later eviction rests on". The
    third evicts while it is read, and begins with snapshots only.

    Args:
        count: How many.
        limits: What they must fit.
        when: Part of their salts, so that none hits what it wrote another time.
    """
    draw = random.Random("canaries")
    planned = []
    for number in range(count):
        options: dict[str, Any] = {}
        salt: str | None = f"canary {number} {when}"
        length, max_tokens = draw.randint(1, 500), 40
        if number % 3 == 1:
            options = GOOD_OPTIONS[number // 3 % len(GOOD_OPTIONS)]
            length = draw.randint(20, limits.longest_kept_prompt)
            max_tokens = 100
        elif number % 3 == 2:
            salt = None
            length = draw.randint(300, limits.max_model_len - max_tokens)
        prompt = _tokens(draw, length, limits)
        if number % 9 == 3:
            # shorter than any window, while it is read and for some of its answer
            prompt = prompt[: 5 + number]
        sampling = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
        adapter = limits.adapter and number % 4 == 3
        planned.append(
            Planned(
                *(-1, ("canary",), prompt, sampling, options, salt),
                canary=number,
                adapter=adapter,
            )
        )
    return planned


def crowd(
    seed: int, count: int, num_canaries: int, limits: Limits
) -> Iterator[Planned]:
    """Yield requests, the same ones for the same arguments, canaries among them."""
    draw = random.Random(seed)
    headers = [_tokens(draw, _LONGEST_HEADER, limits) for _ in range(_NUM_HEADERS)]
    places = [(2 * n + 1) * count // (2 * num_canaries) for n in range(num_canaries)]
    birds = dict(zip(places, canaries(num_canaries, limits, "crowd"), strict=True))
    for number in range(count):
        if number in birds:
            yield replace(birds[number], number=number)
        else:
            yield _draw_one(draw, number, headers, limits)


def _draw_one(
    draw: random.Random, number: int, headers: list[tuple[int, ...]], limits: Limits
) -> Planned:
    max_tokens = draw.choice([1, 2, 8, 16, 16, 32, 32, 64, 150])
    options: dict[str, Any] = {}
    traits = []
    if draw.random() < 0.3:
        options = draw.choice(GOOD_OPTIONS)
        traits.append("options")
    shape, prompt = _draw_prompt(draw, headers, max_tokens, limits)
    if options.get("roco_mode") == "generation":
        prompt = prompt[: limits.longest_kept_prompt]
    traits.append(shape)
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": draw.choice([0, 1]),
        "ignore_eos": draw.random() < 0.7,
    }
    for name, likelihood, change in (
        ("n", 0.12, {"n": draw.randint(2, 4), "temperature": 1}),
        ("logprobs", 0.1, {"logprobs": draw.randint(0, 5)}),
        ("prompt logprobs", 0.05, {"prompt_logprobs": draw.randint(0, 3)}),
        ("stop", 0.08, {"stop": ["e", "th"], "ignore_eos": False}),
        ("min_tokens", 0.08, {"min_tokens": draw.randint(1, max_tokens)}),
    ):
        # vLLM's LoRA layers for CPUs expect a row for each answer, and raise
        if draw.random() < likelihood and not (
            limits.adapter and name == "prompt logprobs"
        ):
            sampling |= change
            traits.append(name)
    if draw.random() < 0.06:
        form = draw.choice([{"choice": ["red", "green", "blue"]}, {"regex": "[a-f]+"}])
        sampling["structured_outputs"] = form
        sampling["ignore_eos"] = False
        # behind a prompt that ends in mid-character vLLM returns both as the answer
        prompt = (*prompt[:-1], FIRST_TOKEN)
        for name in ("stop", "min_tokens"):
            sampling.pop(name, None)
        traits.append("structured")
    leave_after = leave_at = None
    fate = draw.random()
    if fate < 0.1 and max_tokens > 2 and "prompt_logprobs" not in sampling:
        leave_after = draw.randint(1, max_tokens - 1)
        traits.append("cut off")
    elif fate < 0.2:
        leave_at = draw.choice([0.0, 0.01, 0.1, 0.5, 2.0]) * draw.random()
        traits.append("aborted")
    is_refused = False
    if draw.random() < 0.05:
        options, is_refused = draw.choice(BAD_OPTIONS), True
        traits.append("bad options")
    elif draw.random() < 0.02:
        prompt, is_refused = _tokens(draw, limits.max_model_len + 1, limits), True
        traits.append("too long")
    if draw.random() < 0.1:
        salt = draw.choice(["tenant a", "tenant b"])
        traits.append("salt")
    else:
        salt = None
    adapter = limits.adapter and draw.random() < 0.2
    if adapter:
        traits.append("adapter")
    return Planned(
        *(number, tuple(traits), prompt, sampling, options),
        *(salt, leave_after, leave_at, is_refused),
        adapter=adapter,
    )


def _draw_prompt(
    draw: random.Random,
    headers: list[tuple[int, ...]],
    max_tokens: int,
    limits: Limits,
) -> tuple[str, tuple[int, ...]]:
    most = limits.max_model_len - max_tokens
    shape = draw.choices(
        ["one token", "short", "middle", "long", "to the limit", "shared prefix"],
        [4, 30, 20, 10, 3, 33],
    )[0]
    if shape == "shared prefix":
        header = draw.choice(headers)
        header = header[: draw.choice([32, 100, 160, 256, _LONGEST_HEADER])]
        tail = _tokens(draw, draw.choice([0, 1, 10, 40, 150]), limits)
        return shape, (header + tail)[:most]
    length = {
        "one token": 1,
        "short": draw.randint(2, 60),
        "middle": draw.randint(60, 200),
        "long": draw.randint(200, most),
        "to the limit": most,
    }[shape]
    return shape, _tokens(draw, length, limits)


def _tokens(draw: random.Random, length: int, limits: Limits) -> tuple[int, ...]:
    return tuple(draw.choices(range(FIRST_TOKEN, limits.vocabulary), k=length))
