# SPDX-License-Identifier: Apache-2.0
"""How long a preset takes with a model of another size, from one cell measured with it.

The weights are made up, which costs as much time as real ones. A few prompts are read,
and read again with an answer to each: that tells what a token read and a token written
cost. All cells of the plugin and of the full cache are counted with these two numbers,
and with the engines that have to be started for them, one at a time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.quality.cells import (
    GENERATION,
    PERPLEXITY,
    PERPLEXITY_GENERATION,
    PROMPT_OF_GENERATION,
    Cell,
)
from benchmarks.quality.grid import DEFAULT, Preset, cells, jobs, setup_of
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.tasks import CONVERSATIONS
from benchmarks.quality.tasks.derivation import DERIVATION, prompt_tokens
from benchmarks.quality.tasks.exchange import PAUSE_TOKENS

ANSWER_TOKENS = 128
"""Of every answer that is not long: more than most take."""
CONTEXT, SHARE = 4096, 0.25
"""Of the measured cell."""


@dataclass(frozen=True)
class Pace:
    """What was measured.

    Attributes:
        start: Seconds until an engine was there.
        read: Tokens of prompts a second.
        written: Tokens of answers a second, all prompts together.
    """

    start: float
    read: float
    written: float


@dataclass(frozen=True)
class Work:
    """Tokens of cells.

    Attributes:
        read: Of prompts.
        written: Of answers.
        engines: To be started.
    """

    read: int
    written: int
    engines: int

    def seconds(self, pace: Pace) -> float:
        """Return how long it takes, one engine at a time."""
        reading, writing = self.read / pace.read, self.written / pace.written
        return self.engines * pace.start + reading + writing


def work_of(wanted: Sequence[Cell]) -> Work:
    """Return what cells come to, at most."""
    tokens = [_tokens(cell) for cell in wanted]
    read, written = (
        sum(cell.n * each[i] for cell, each in zip(wanted, tokens, strict=True))
        for i in (0, 1)
    )
    return Work(read, written, len(jobs(wanted)))


def _tokens(cell: Cell) -> tuple[int, int]:
    """Return the tokens that are read and written for one problem."""
    context = cell.context
    if cell.task in (PERPLEXITY, PERPLEXITY_GENERATION):
        return context, 0
    if cell.task in (GENERATION, DERIVATION):
        is_prose = cell.task == GENERATION
        prompt = PROMPT_OF_GENERATION if is_prose else prompt_tokens(context)
        return prompt, context - prompt
    form = CONVERSATIONS.get(cell.task)
    if not form:
        return context, ANSWER_TOKENS
    # every question is asked with all that was said before
    pause = PAUSE_TOKENS if form.pause else 0
    read = form.questions * context + form.pause * (context + pause)
    return read, form.questions * ANSWER_TOKENS + pause


def cells_of_vllm(preset: Preset) -> list[Cell]:
    """Return the cells that a model of one's own is asked for."""
    every = cells(preset, model="", seed=preset.seed, n=None)
    return [cell for cell in every if cell.setup.engine == "vllm"]


def measure(folder: Path, n: int) -> Pace:
    """Return what a model of a shape makes of one cell.

    Args:
        folder: Of its configuration; there need be no weights.
        n: Prompts.
    """
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from benchmarks.quality.with_vllm import engine_arguments

    setup = setup_of(DEFAULT, int(SHARE * CONTEXT), 256, 512)
    begin = time.monotonic()
    llm = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        **engine_arguments(setup, CONTEXT),
    )
    start = time.monotonic() - begin
    draw = random.Random(0)
    prompts = [
        TokensPrompt(prompt_token_ids=[draw.randrange(1000) for _ in range(CONTEXT)])
        for _ in range(n)
    ]

    def seconds(tokens: int) -> float:
        asked = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begin = time.monotonic()
        llm.generate(prompts, asked, use_tqdm=False)
        return time.monotonic() - begin

    seconds(2)  # kernels are loaded
    reading = seconds(1)
    writing = max(seconds(ANSWER_TOKENS) - reading, 1e-3)
    llm.llm_engine.engine_core.shutdown()
    return Pace(start, n * CONTEXT / reading, n * (ANSWER_TOKENS - 1) / writing)


def estimate(arguments: argparse.Namespace) -> None:
    """Measure, tell, and write `estimate.json`."""
    preset = PRESETS[arguments.preset]
    given = arguments.pace
    pace = Pace(*given) if given else measure(arguments.shape, arguments.n)
    told: dict[str, Any] = {
        **machine.environment_elsewhere(),
        "commit": arguments.commit or machine.commit(),
        "shape": arguments.shape.name,
        "preset": arguments.preset,
        "pace": {name: round(value, 1) for name, value in asdict(pace).items()},
    }
    wanted = cells_of_vllm(preset)
    for name, chosen in {
        "all methods": wanted,
        f"full and {DEFAULT}": _of(wanted, ("full", DEFAULT)),
        f"full and {DEFAULT} at {CONTEXT}, {SHARE:.0%}": _one_share(wanted),
    }.items():
        work = work_of(chosen)
        minutes = work.seconds(pace) / 60
        told[name] = {
            **asdict(work),
            "cells": len(chosen),
            "minutes": round(minutes, 1),
        }
        print(f"{name}: {len(chosen)} cells, {minutes:.0f} minutes", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "estimate.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    print(path)


def _of(wanted: Iterable[Cell], methods: Sequence[str]) -> list[Cell]:
    return [cell for cell in wanted if cell.setup.method in methods]


def _one_share(wanted: Iterable[Cell]) -> list[Cell]:
    return [
        cell
        for cell in _of(wanted, ("full", DEFAULT))
        if cell.context == CONTEXT and cell.budget_ratio in (1.0, SHARE)
    ]
