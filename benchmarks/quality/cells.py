# SPDX-License-Identifier: Apache-2.0
"""What is measured: a task, how the cache is kept, and what runs the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from benchmarks.quality.tasks.problem import Question

PERPLEXITY = "perplexity"
"""Loss of a novel's passages, read in chunks as a prompt is."""
PERPLEXITY_GENERATION = "perplexity-generation"
"""The same in chunks that end where something is evicted.

In between nothing goes, so that every token sees what it would see if the text were
generated token by token, and every block is looked at as often.
"""
GENERATION = "generation"
"""Long greedy continuation of prose, judged by the model with its full cache."""

QUESTION_METRIC = "accuracy, question "
"""Metric of one question of several, before its number."""
PROMPT_OF_GENERATION = 256
"""Tokens of prose that a `GENERATION` continues; it fills the rest of the context."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a cache is kept, and by what; a budget of 0 stands for the full cache.

    Attributes:
        method: As tables and plots call it.
        engine: `vllm`, `oracle` for plain PyTorch, or `kvpress`.
        policy: `full`, an option of the plugin, or a method of the engine.
        shield: Statistic of RoCo's first stage; empty where there is none.
        shield_ratio: Share of the budget that it shields.
        budget: Tokens kept.
        stride: Tokens evicted at a time.
        chunk: Prompt tokens read per step; 0 where the engine decides.
        block_size: Tokens that are kept or go together.
        kv_cache_dtype: Of vLLM; `auto` is the model's.
        options: Of the oracle: fields of `EvictionMethod` or `Rule`, name and value.
        request: Of the plugin: options that each request brings, name and value. The
            server has its defaults, and `budget` is told for the tables alone.
    """

    method: str
    engine: str
    policy: str
    shield: str = ""
    shield_ratio: float = 0.0
    budget: int = 0
    stride: int = 0
    chunk: int = 0
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    options: tuple[tuple[str, Any], ...] = ()
    request: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the table, or a few that come of the same run.

    Attributes:
        task: One of `benchmarks.quality.tasks.TASKS`, or of this module.
        context: Most tokens of a prompt; of a whole text where there is no problem.
        n: Problems or texts.
        seed: See `benchmarks.quality.tasks`.
        model: Name of the model's folder.
        setup: How the cache is kept.
    """

    task: str
    context: int
    n: int
    seed: int
    model: str
    setup: Setup

    @property
    def budget_ratio(self) -> float:
        """Budget over context; 1 for the full cache."""
        return self.setup.budget / self.context if self.setup.budget else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields, those of the setup among them."""
        fields = asdict(self)
        setup: dict[str, Any] = fields.pop("setup")
        return fields | setup

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Cell:
        """Read what `to_json` returned."""
        values = dict(fields)
        names = values.keys() & Setup.__annotations__.keys()
        setup = {name: values.pop(name) for name in names}
        for name in ("options", "request"):
            setup[name] = tuple(map(tuple, setup.get(name, ())))
        return cls(**values, setup=Setup(**setup))


Job = Sequence[Cell]
"""What one process measures, one after another: all with the same engine.

With vLLM, all have the same setup, too, but for what requests bring.
"""


class Engine(Protocol):
    """What runs a model, each in a module `with_NAME` of its own."""

    def __init__(self, model: str, cells: Job) -> None:
        """Load a model, a Hugging Face folder, for cells of one job."""

    def answers(
        self,
        cell: Cell,
        prompts: Sequence[list[int]],
        max_tokens: int,
        *,
        to_the_end: bool = False,
    ) -> list[list[int]]:
        """Return the greedy continuation of every prompt.

        Args:
            cell: How the cache is kept.
            prompts: Token ids.
            max_tokens: Most tokens of a continuation.
            to_the_end: Whether it is as long, whatever the model thinks.
        """

    def converse(
        self, cell: Cell, conversations: Sequence[Sequence[Question]]
    ) -> list[list[list[int]]]:
        """Return the answers in every conversation, end tokens among them.

        Each question is a request with all that was said before in front of it, as
        servers of chats get it. An engine whose state can live on has a method of its
        own.
        """
        said: list[list[int]] = [[] for _ in conversations]
        answers: list[list[list[int]]] = [[] for _ in conversations]
        for asked in zip(*conversations, strict=True):
            prompts = [
                [*text, *question.token_ids]
                for text, question in zip(said, asked, strict=True)
            ]
            most, to_the_end = asked[0].max_tokens, asked[0].to_the_end
            found = self.answers(cell, prompts, most, to_the_end=to_the_end)
            said = [
                [*prompt, *answer]
                for prompt, answer in zip(prompts, found, strict=True)
            ]
            for known, answer in zip(answers, found, strict=True):
                known.append(answer)
        return answers

    def losses(
        self, cell: Cell, texts: Sequence[list[int]], first: int
    ) -> list[list[float]]:
        """Return the nats of every token from the `first` on."""
        raise NotImplementedError(f"{type(self).__module__} has no {cell.task}.")

    def close(self) -> None:
        """End what would keep the process from ending, if anything does."""
