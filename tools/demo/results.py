# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: one table, which fits 80 columns, and one picture."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path

import matplotlib
from rich import box
from rich.table import Table

from benchmarks.pictures import BLUE, GREY, ORANGE, STYLE, legend, panels
from tools.demo.measured import Metrics, Sequence
from tools.demo.requests import Answer, Prompt

_VERDICTS = {True: "[green]right[/]", False: "[red]wrong[/]"}


def build_table(
    answers: Items[Answer], sequences: Items[Sequence], metrics: Metrics
) -> Table:
    """Return one row per request and a last one with the server's own counters.

    Args:
        answers: What came back.
        sequences: Their lines of the trace, in the same order.
        metrics: Scraped after the last answer.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        show_footer=True,
        padding=0,
        header_style="bold",
        caption_justify="left",
        caption=f"Budget and KV held are in tokens, the latter by whole blocks of "
        f"{metrics.block_size}; full KV is what full attention holds.\n"
        "tok/s is the speed of reading the passkey prompt and of writing the rest.",
    )
    table.add_column("request", "by /metrics", no_wrap=True)
    footers = {
        "\nbudget": f"{metrics.budget_tokens:,}",
        "peak\nKV held": f"{metrics.peak_sequence_kv_tokens:,}",
        "blocks\nfreed": f"{metrics.freed_blocks:,}",
    }
    for header in (
        *("tokens\nread", "tokens\nwritten", "\nbudget", "peak\nKV held"),
        *("full\nKV", "\nshare", "blocks\nfreed", "\nanswer", "\ntok/s"),
    ):
        footer = footers.get(header, "")
        table.add_column(header, footer, justify="right", no_wrap=True)
    for answer, sequence in zip(answers, sequences, strict=True):
        held, full = max(sequence.held_tokens), max(sequence.full_tokens)
        passkey = answer.prompt.passkey
        table.add_row(
            answer.prompt.name,
            f"{answer.tokens_read:,}",
            f"{answer.tokens_written:,}",
            f"{answer.prompt.budget:,}",
            f"{held:,}",
            f"{full:,}",
            f"{held / full:.0%}",
            f"{sequence.freed_tokens // metrics.block_size:,}",
            _VERDICTS[passkey.is_answered_by(answer.text)] if passkey else "-",
            f"{answer.tokens_per_second:,.1f}",
        )
    return table


@matplotlib.rc_context(STYLE)
def draw_picture(
    path: Path, prompts: Items[Prompt], sequences: Items[Sequence]
) -> None:
    """Write a picture with one panel per sequence.

    Args:
        path: The file; missing folders are made.
        prompts: What was asked, one a panel.
        sequences: What to show, in the same order.
    """
    figure, axes = panels(len(sequences), columns=4, size=(2.8, 2.4), sharey=True)
    for panel, prompt, sequence in zip(axes, prompts, sequences, strict=True):
        seconds = [time - sequence.times[0] for time in sequence.times]
        held, full = sequence.held_tokens, sequence.full_tokens
        panel.fill_between(
            seconds, held, full, step="post", color=BLUE, alpha=0.10, linewidth=0
        )
        for tokens, label, style in (
            (full, "full attention", {"color": GREY, "linestyle": "--"}),
            (held, "held with RoCo", {"color": BLUE, "linewidth": 1.8}),
        ):
            panel.step(seconds, tokens, where="post", label=label, **style)
        panel.axhline(prompt.budget, color=ORANGE, linewidth=0.9, label="budget")
        panel.set(title=f"{prompt.name}: {max(held):,} instead of {max(full):,}")
        panel.set(xlabel="seconds", xlim=(0, None), ylim=(0, None))
        panel.yaxis.set_major_formatter("{x:,.0f}")
        if panel.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            panel.set_ylabel("KV tokens held")
    legend(figure, axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
