# SPDX-License-Identifier: Apache-2.0
"""The demo's one table."""

from __future__ import annotations

from collections.abc import Sequence as Items

from rich import box
from rich.table import Table
from rich.text import Text

from tools.demo.client import Answer
from tools.demo.measured import Metrics, Sequence


def build_table(
    answers: Items[Answer], sequences: Items[Sequence], metrics: Metrics
) -> Table:
    """Return one row per request and a last one with the server's own counters.

    Args:
        answers: What came back.
        sequences: Their lines of the trace, in the same order.
        metrics: Scraped after the last answer.
    """
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, header_style="bold")
    for header, footer in (
        ("request", "all, by /metrics"),
        ("tokens\nread", ""),
        ("tokens\nwritten", ""),
        ("peak KV\ntokens held", f"{metrics.peak_sequence_kv_tokens:,}"),
        ("full attention\nwould hold", ""),
        ("share", ""),
        ("blocks\nfreed", f"{metrics.freed_blocks:,}"),
        ("answer", ""),
        ("tokens/s", ""),
    ):
        left = header in ("request", "answer")
        table.add_column(
            header, footer, justify="left" if left else "right", no_wrap=True
        )
    for answer, sequence in zip(answers, sequences, strict=True):
        peak, full = max(sequence.held_tokens), max(sequence.full_tokens)
        table.add_row(
            answer.prompt.name,
            f"{answer.tokens_read:,}",
            f"{answer.tokens_written:,}",
            f"{peak:,}",
            f"{full:,}",
            f"{peak / full:.0%}",
            f"{sequence.freed_blocks:,}",
            _verdict(answer),
            _speed(answer),
        )
    return table


def _verdict(answer: Answer) -> Text:
    if answer.is_right is None:
        return Text("-")
    if answer.is_right:
        return Text("right", style="green")
    return Text("wrong", style="red")


def _speed(answer: Answer) -> str:
    if answer.prompt.passkey is not None:
        return f"{answer.tokens_read / answer.read_seconds:,.0f} read"
    # the first token belongs to reading
    return f"{(answer.tokens_written - 1) / answer.write_seconds:,.1f} written"
