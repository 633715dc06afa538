# SPDX-License-Identifier: Apache-2.0
"""The demo's one table; it fits a terminal of 80 columns."""

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
    table = Table(
        box=box.SIMPLE_HEAD,
        show_footer=True,
        padding=0,
        header_style="bold",
        caption_justify="left",
        caption=f"KV held is in tokens, by whole blocks of {metrics.block_size}; the "
        f"budget is {metrics.budget_tokens:,}.\n"
        "tokens/s is the speed of reading the passkey prompt and of writing the rest.",
    )
    table.add_column("request", "by /metrics", no_wrap=True)
    for header, footer in (
        ("tokens\nread", ""),
        ("tokens\nwritten", ""),
        ("peak\nKV held", f"{metrics.peak_sequence_kv_tokens:,}"),
        ("full\nattention", ""),
        ("\nshare", ""),
        ("blocks\nfreed", f"{metrics.freed_blocks:,}"),
        ("\nanswer", ""),
        ("\ntokens/s", ""),
    ):
        table.add_column(header, footer, justify="right", no_wrap=True)
    for answer, sequence in zip(answers, sequences, strict=True):
        held, full = max(sequence.held_tokens), max(sequence.full_tokens)
        table.add_row(
            answer.prompt.name,
            f"{answer.tokens_read:,}",
            f"{answer.tokens_written:,}",
            f"{held:,}",
            f"{full:,}",
            f"{held / full:.0%}",
            f"{sequence.freed_blocks:,}",
            _verdict(answer),
            f"{_tokens_per_second(answer):,.1f}",
        )
    return table


def _verdict(answer: Answer) -> Text:
    if answer.is_right is None:
        return Text("-")
    if answer.is_right:
        return Text("right", style="green")
    return Text("wrong", style="red")


def _tokens_per_second(answer: Answer) -> float:
    if answer.prompt.passkey is not None:
        return answer.tokens_read / answer.read_seconds
    # the first token belongs to reading
    return (answer.tokens_written - 1) / answer.write_seconds
