# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: a long prompt, the same asked again, budgets side by side."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from benchmarks.pictures import BLUE, GREY, ORANGE, STYLE, panels
from tools.demo.measured import Sequence
from tools.demo.requests import Answer

_ROOM_FOR_WORDS = 1.3


@matplotlib.rc_context(STYLE)
def draw_picture(
    path: Path, answers: Items[Answer], sequences: Items[Sequence]
) -> None:
    """Write the picture.

    Args:
        path: The file; missing folders are made.
        answers: What came back, the questions first.
        sequences: Their lines of the trace, in the same order.
    """
    questions = sum(answer.prompt.passkey is not None for answer in answers)
    figure, axes = panels(3, columns=3, size=(3.2, 2.4))
    _show_reading(axes[0], answers[0], sequences[0])
    _show_waiting(axes[1], answers[:questions], sequences[:questions])
    _show_budgets(axes[2], answers[questions:], sequences[questions:])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _show_reading(axes: Axes, answer: Answer, sequence: Sequence) -> None:
    """What one request holds while its prompt is read."""
    held, full = sequence.held_tokens, sequence.full_tokens
    axes.fill_between(
        _seconds(sequence), held, full, step="post", color=BLUE, alpha=0.10, linewidth=0
    )
    _draw(axes, sequence, full, "full attention", color=GREY, linestyle="--")
    _draw(axes, sequence, held, "RoCo", color=BLUE, linewidth=1.8)
    _draw_budget(axes, answer.prompt.budget, BLUE)
    if evicted := [i for i, of in enumerate(full) if of > held[i]]:
        axes.annotate(
            "first eviction",
            (_seconds(sequence)[evicted[0]], held[evicted[0]]),
            xytext=(0, -56),
            textcoords="offset points",
            arrowprops={"arrowstyle": "->", "color": GREY},
        )
    _finish(axes, f"One long prompt: {max(held):,} of {max(full):,} tokens held")


def _show_waiting(
    axes: Axes, answers: Items[Answer], sequences: Items[Sequence]
) -> None:
    """How long each question waits for its first token, the first question on top."""
    names = [
        f"{answer.prompt.name}:\n{sequence.hit_tokens:,} of {answer.tokens_read:,}\n"
        "tokens were\nin the cache"
        for answer, sequence in zip(answers, sequences, strict=True)
    ]
    seconds = [answer.first_token_seconds for answer in answers]
    bars = axes.barh(names, seconds, height=0.6, color=[GREY, BLUE])
    axes.bar_label(bars, fmt="%.1f s", padding=3)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(
        title=f"Asked again: answered in {seconds[-1]:.1f} s, not {seconds[0]:.1f} s",
        xlabel="seconds to the first token",
        xlim=(0, _ROOM_FOR_WORDS * max(seconds)),
    )


def _show_budgets(
    axes: Axes, answers: Items[Answer], sequences: Items[Sequence]
) -> None:
    """What the requests of one batch hold, those of a budget in one colour."""
    longest = max(sequences, key=lambda sequence: sequence.full_tokens[-1])
    _draw(
        axes, longest, longest.full_tokens, "full attention", color=GREY, linestyle="--"
    )
    budgets = sorted({answer.prompt.budget for answer in answers}, reverse=True)
    for budget, colour in zip(budgets, (BLUE, ORANGE), strict=False):
        alike = [
            sequence
            for answer, sequence in zip(answers, sequences, strict=True)
            if answer.prompt.budget == budget
        ]
        held = max(max(sequence.held_tokens) for sequence in alike)
        labels = [f"RoCo: at most {held:,} held"]
        for sequence, label in zip_longest(alike, labels):
            _draw(
                axes, sequence, sequence.held_tokens, label, color=colour, linewidth=1.8
            )
        _draw_budget(axes, budget, colour)
    _finish(axes, f"One batch, {len(answers)} requests, {len(budgets)} budgets")


def _seconds(sequence: Sequence) -> list[float]:
    return [time - sequence.times[0] for time in sequence.times]


def _draw(
    axes: Axes,
    sequence: Sequence,
    tokens: Items[int],
    label: str | None,
    **style: Any,
) -> None:
    axes.step(_seconds(sequence), tokens, where="post", label=label, **style)


def _draw_budget(axes: Axes, budget: int, colour: str) -> None:
    axes.axhline(budget, color=colour, linewidth=0.9, linestyle=":")
    right_end: Any = axes.get_yaxis_transform()
    axes.text(
        1,
        budget,
        f"budget {budget:,}",
        transform=right_end,
        color=colour,
        ha="right",
        va="top",
    )


def _finish(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel="seconds", ylabel="KV tokens held")
    # with room for the legend
    axes.set(xlim=(0, None), ylim=(0, 1.15 * axes.get_ylim()[1]))
    axes.margins(x=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left")
