# SPDX-License-Identifier: Apache-2.0
"""Values that follow from values which the model wrote itself, far behind.

A short list of steps is read: each names an earlier value, a digit that is added to it,
and the new value's name. The model works them out one after the other in sentences, as
a chain of thought does: what an earlier value is stands nowhere but in what it wrote.
Any earlier one is as likely to be needed. Each step is judged by the values as the
model wrote them, so that one mistake is one mistake. What is written behind the last
one does not count.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from benchmarks.quality.tasks.exchange import Exchange, Writer, fitted
from benchmarks.quality.tasks.material import report_material
from benchmarks.quality.tasks.problem import Problem

TEXT = (
    "Work out the steps below, one after the other. Only the last digit of a sum "
    "counts, and zero is 0.\n{text}\nSolution:\n"
)
STEP = "{number}. {operand} + {digit} = {name}"
WORKED = (
    "{step}: we know that {operand} is {value}, and {value} + {digit} makes {result}, "
    "so from now on {name} is {result}."
)
DERIVATION = "derivation"
PROMPT_SHARE = 0.2
"""Of a text, for the list of steps; the rest is written."""

_FIRST = "zero"
_STEP = r"(\d+)\. (\w+) \+ (\d) = (\w+)"
_LISTED = re.compile(rf"^{_STEP}$", re.MULTILINE)
_WORKED = re.compile(rf"^{_STEP}: .* that (\w+) is (\d), .* on (\w+) is (\d)\.$")


@dataclass(frozen=True)
class Step:
    """One sum.

    Attributes:
        operand: Name of an earlier value, or `zero`.
        digit: Added to it.
        name: Of the new value.
    """

    operand: str
    digit: int
    name: str

    def listed(self, number: int) -> str:
        """Return its line in the list."""
        return STEP.format(number=number, **vars(self))


def prompt_tokens(context: int) -> int:
    """Return the most tokens of a prompt of which `context` tokens come in all."""
    return int(context * PROMPT_SHARE)


def write_derivation(writer: Writer, questions: int = 1) -> list[Exchange]:
    """Return steps, and how they are worked out.

    Args:
        writer: Draws names and digits; its room is that of the list.
        questions: There is only one.
    """
    drawn, listing = itertools.tee(_steps(writer))
    lines = (f"{each.listed(number)}\n" for number, each in enumerate(listing, 1))
    listed = writer.fill(lines, TEXT)
    values = {_FIRST: 0}
    worked = []
    for line, each in zip(listed, drawn, strict=False):
        value = values[each.operand]
        values[each.name] = result = (value + each.digit) % 10
        sums = {"value": value, "result": result}
        worked.append(WORKED.format(step=line.rstrip("\n"), **vars(each), **sums))
    _, *names = values
    ask, reply = TEXT.format(text="".join(listed).rstrip("\n")), "\n".join(worked)
    most = int(writer.room * (1 / PROMPT_SHARE - 1))
    return [Exchange(ask, reply, tuple(names), most)]


@dataclass(frozen=True)
class Derivation(Problem):
    """Steps whose values' names are `answers`, in their order.

    Attributes:
        steps: What is worked out.
    """

    steps: tuple[Step, ...] = ()

    @override
    def score(self, text: str) -> float:
        """Return the share of steps that follow from what was written before them."""
        written = {_FIRST: "0"}
        right = set()
        for line in text.splitlines():
            if not (found := _WORKED.match(line.strip())):
                continue
            number, operand, digit, name, known, value, new, result = found.groups()
            follows = (int(value) + int(digit)) % 10 == int(result)
            place = int(number) - 1
            asked = self.steps[place] if place < len(self.steps) else None
            if (
                asked == Step(operand, int(digit), name)
                and (known, new) == (operand, name)
                and written.get(operand) == value
                and follows
            ):
                right.add(place)
            written.setdefault(new, result)
        return len(right) / len(self.steps)


def build_derivations(tokenizer: Any, context: int, n: int, seed: int) -> list[Problem]:
    """Return `n` problems whose list and solution take about `context` tokens.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        context: Most tokens of a prompt and of what is written.
        n: Number of problems.
        seed: Chooses names and digits.
    """
    problems: list[Problem] = []
    for index in range(n):
        (exchange,) = fitted(
            lambda writer: write_derivation(writer),
            f"derivation {seed} {index}",
            report_material(),
            tokenizer,
            prompt_tokens(context),
        )
        problems.append(to_derivation(exchange, tokenizer))
    return problems


def to_derivation(exchange: Exchange, tokenizer: Any) -> Derivation:
    """Return what a model is asked."""
    ids = list(tokenizer(exchange.ask)["input_ids"])
    steps = tuple(
        Step(operand, int(digit), name)
        for _, operand, digit, name in _LISTED.findall(exchange.ask)
    )
    return Derivation(ids, exchange.max_tokens, exchange.answers, steps=steps)


def _steps(writer: Writer) -> Iterator[Step]:
    """Yield steps, as many as there are words."""
    draw = writer.draw
    known = [_FIRST]
    for name in draw.sample(writer.material.words, len(writer.material.words)):
        yield Step(draw.choice(known), draw.randrange(10), name)
        known.append(name)
