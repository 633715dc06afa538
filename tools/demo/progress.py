# SPDX-License-Identifier: Apache-2.0
"""What moves on the terminal while the demo waits; a log file gets none of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from tools.demo.prompts import Prompt

_TEXT = TextColumn("      {task.description}")


@contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    """Show `text` and the seconds since."""
    with Progress(
        _TEXT,
        SpinnerColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # the server needs the cores
        refresh_per_second=4,
        disable=not console.is_terminal,
    ) as progress:
        progress.add_task(text, total=None)
        yield


@contextmanager
def token_bars(
    console: Console, prompts: Sequence[Prompt]
) -> Iterator[Callable[[Prompt], None]]:
    """Show a bar of written tokens per prompt; yields what to call for each token."""
    with Progress(
        _TEXT,
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # the server needs the cores
        refresh_per_second=4,
        disable=not console.is_terminal,
    ) as progress:
        tasks = {
            prompt.name: progress.add_task(
                f"{prompt.name}, {len(prompt.token_ids):,} tokens to read",
                total=prompt.max_tokens,
            )
            for prompt in prompts
        }
        yield lambda prompt: progress.advance(tasks[prompt.name])
