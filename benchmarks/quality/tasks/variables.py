# SPDX-License-Identifier: Apache-2.0
"""Variables assigned to one another: RULER's `vt` (arXiv 2404.06654), with any filler.

An example with shorter names comes first, as RULER has it.
"""

from __future__ import annotations

import itertools
import random
import string

from benchmarks.quality.tasks.exchange import Exchange, Writer

TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following "
    "text.\n\n{text}\n"
)
# the misspelt word is RULER's
QUESTION = (
    "Question: Find all variables that are assigned the value {value} in the text "
    "above. Answer: According to the chain(s) of variable assignment in the text "
    "above, 5 variables are assgined the value {value}, they are:"
)
ANSWER_TOKENS = 30
HOPS = 4

_EXAMPLE_LINES = 10


def write_variables(writer: Writer, questions: int) -> list[Exchange]:
    """Return filler with a chain of five variables, all of which are asked for.

    Args:
        writer: Draws names and filler.
        questions: Chains; one, as RULER has it, or more.
    """
    draw = writer.draw
    filler = _filler(writer)
    chains = [_chain(draw, 5) for _ in range(questions)]
    example = _chain(draw, 3)
    values = [str(draw.randint(10_000, 99_998)) for _ in range(questions + 1)]
    shown = (
        TEXT.format(text=_scatter(draw, [filler] * _EXAMPLE_LINES, example, values[-1]))
        + QUESTION.format(value=values[-1])
        + f"  {' '.join(example)}\n\n\n\n"
    )
    others = [
        line
        for chain, value in zip(chains, values, strict=False)
        for line in _assignments(chain, value)
    ]
    ask = QUESTION.format(value=values[0])
    lines = writer.fill(itertools.repeat(f" {filler}"), shown, TEXT, ask, *others)
    text = [filler] * len(lines)
    for chain, value in zip(chains, values, strict=False):
        text = _with_chain(draw, text, chain, value)
    first = shown + TEXT.format(text=" ".join(text)) + ask
    exchanges: list[Exchange] = []
    for chain, value in zip(chains, values, strict=False):
        again = f"\n{QUESTION.format(value=value)}" if exchanges else first
        reply = f" {' '.join(chain)}"
        exchanges.append(Exchange(again, reply, tuple(chain), ANSWER_TOKENS))
    return exchanges


def _filler(writer: Writer) -> str:
    """Return a line of sentences of words, the same in all of a text."""
    words = iter(writer.draw.sample(writer.material.words, 12))
    sentences = [f"The {next(words)} is {next(words)}." for _ in range(3)]
    ending = f"{next(words).capitalize()} we {next(words)}."
    return f"{' '.join(sentences)} {ending} There and {next(words)} {next(words)}.\n"


def _chain(draw: random.Random, letters: int) -> list[str]:
    return [
        "".join(draw.choices(string.ascii_uppercase, k=letters))
        for _ in range(HOPS + 1)
    ]


def _assignments(chain: list[str], value: str) -> list[str]:
    later = [f"VAR {name} = VAR {last} " for last, name in itertools.pairwise(chain)]
    return [f"VAR {chain[0]} = {value}", *later]


def _with_chain(
    draw: random.Random, lines: list[str], chain: list[str], value: str
) -> list[str]:
    lines = list(lines)
    assignments = _assignments(chain, value)
    places = sorted(draw.choices(range(len(lines)), k=len(assignments)))
    for place, line in reversed(list(zip(places, assignments, strict=True))):
        lines.insert(place, line)
    return lines


def _scatter(
    draw: random.Random, lines: list[str], chain: list[str], value: str
) -> str:
    return " ".join(_with_chain(draw, lines, chain, value))
