# SPDX-License-Identifier: Apache-2.0
"""The opt-in trace: what every scheduled request held, step by step, as JSON lines.

    {"time": 1735689600.25, "step": 7, "request": "cmpl-1", "computed_tokens": 512,
     "held_blocks": 18}

For looking at what the budget does (`RocoConfig.trace`), not for production: it costs
a line per request and step.
"""

from __future__ import annotations

import json
import time
import weakref
from pathlib import Path


def check_path(path: str) -> None:
    """Raise early, before an engine is started, and leave a file as it is.

    Args:
        path: The option `trace`.

    Raises:
        ValueError: The file cannot be written.
    """
    file = Path(path).expanduser()
    existed = file.exists()
    try:
        file.open("a").close()
    except OSError as error:
        raise _unwritable(path, error) from error
    if not existed:
        file.unlink()


class TraceWriter:
    """Writes one engine core's trace to a new file.

    Args:
        path: The option `trace`. `~` is expanded; the file is replaced if it exists.
        engine: Data-parallel index of the engine core. Engines other than the first
            write beside it: `trace.jsonl`, `trace.dp1.jsonl`, `trace.dp2.jsonl`.

    Raises:
        ValueError: The file cannot be written.
    """

    def __init__(self, path: str, engine: int = 0) -> None:
        self.path = Path(path).expanduser()
        if engine:
            self.path = self.path.with_name(
                f"{self.path.stem}.dp{engine}{self.path.suffix}"
            )
        try:
            self._file = self.path.open("w", encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error
        self._finalizer = weakref.finalize(self, self._file.close)

    def write(
        self, step: int, request_id: str, num_computed_tokens: int, held_blocks: int
    ) -> None:
        """Add one line; readers see it after `flush`.

        Args:
            step: The scheduler's step, counted from the start of the engine.
            request_id: The request, by vLLM's name for it.
            num_computed_tokens: Tokens of the request that are computed.
            held_blocks: Blocks that the block manager holds for it.
        """
        record = {
            "time": round(time.time(), 6),
            "step": step,
            "request": request_id,
            "computed_tokens": num_computed_tokens,
            "held_blocks": held_blocks,
        }
        self._file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Show the step's lines to readers; call it once per step."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close. Closing twice is harmless."""
        self._finalizer()


def _unwritable(path: str, error: OSError) -> ValueError:
    return ValueError(
        f"roco: trace = {path!r} cannot be written: {error.strerror} "
        f"({Path(path).expanduser().absolute()}). Use a file in an existing directory "
        "that this user may write, or leave trace out."
    )
