# SPDX-License-Identifier: Apache-2.0
"""The demo's table, which fits 80 columns."""

from __future__ import annotations

from collections.abc import Sequence as Items

from rich import box
from rich.table import Table

from tools.demo.measured import Metrics, Sequence
from tools.demo.requests import Answer

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
        caption="In tokens, but for blocks; KV held by whole blocks of "
        f"{metrics.block_size}.\n"
        "from cache: how much of the prompt was read before, for another request;\n"
        "full KV: what full attention holds; first token: seconds until it came.",
    )
    table.add_column("request", "by /metrics", no_wrap=True)
    footers = {
        "\nbudget": f"{metrics.budget_tokens:,}",
        "peak\nKV held": f"{metrics.peak_sequence_kv_tokens:,}",
        "blocks\nfreed": f"{metrics.freed_blocks:,}",
    }
    for header in (
        *("\nprompt", "from\ncache", "\nwritten", "\nbudget", "peak\nKV held"),
        *("full\nKV", "blocks\nfreed", "\nanswer", "first\ntoken"),
    ):
        footer = footers.get(header, "")
        table.add_column(header, footer, justify="right", no_wrap=True)
    for answer, sequence in zip(answers, sequences, strict=True):
        passkey = answer.prompt.passkey
        table.add_row(
            answer.prompt.name,
            f"{answer.tokens_read:,}",
            f"{sequence.hit_tokens:,}",
            f"{answer.tokens_written:,}",
            f"{answer.prompt.budget:,}",
            f"{max(sequence.held_tokens):,}",
            f"{max(sequence.full_tokens):,}",
            f"{sequence.freed_tokens // metrics.block_size:,}",
            _VERDICTS[passkey.is_answered_by(answer.text)] if passkey else "-",
            f"{answer.first_token_seconds:,.2f}",
        )
    return table
