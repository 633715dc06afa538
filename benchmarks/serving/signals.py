# SPDX-License-Identifier: Apache-2.0
"""Signals that end a benchmark: once, and not in the middle of a start or an end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a terminal, a time limit and a lost connection send."""


def unwind_once() -> None:
    """Let the first of these signals raise, so that all that runs is ended.

    Those after it are ignored: ending takes seconds, and who does not see it end at
    once asks again.
    """
    for number in ENDING:
        signal.signal(number, _unwind)


@contextmanager
def held_back() -> Iterator[None]:
    """Let the signals come when the block is done; the first of them, if several."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        for number in ENDING:
            signal.signal(number, lambda number, _: caught.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


def _unwind(number: int, frame: FrameType | None) -> None:
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
