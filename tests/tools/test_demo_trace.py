# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from tools.demo import DemoError
from tools.demo.measured import find_sequence, read_trace


def test_trace_is_read_by_request(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"time": 1.0, "step": 0, "request": "a-0", "computed_tokens": 17, '
        '"held_blocks": 2, "hit_tokens": 0}\n'
        '{"time": 1.0, "step": 0, "request": "b-0", "computed_tokens": 16, '
        '"held_blocks": 1, "hit_tokens": 0}\n'
        '{"time": 2.0, "step": 1, "request": "a-0", "computed_tokens": 33, '
        '"held_blocks": 1}\n'
    )

    sequences = read_trace(trace, block_size=16)

    first = find_sequence(sequences, "a")
    assert first.times == [1.0, 2.0]
    assert first.held_tokens == [32, 16]
    assert first.full_tokens == [32, 48]
    assert first.freed_tokens == 32
    assert first.hit_tokens == 0
    assert find_sequence(sequences, "b").freed_tokens == 0
    with pytest.raises(DemoError, match="0 requests named c"):
        find_sequence(sequences, "c")


def test_what_is_missing_since_a_hit_was_freed_by_others(tmp_path: Path) -> None:
    """A preempted request comes back with another hit, of what it has written too."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"time": 1.0, "step": 7, "request": "a-0", "computed_tokens": 80, '
        '"held_blocks": 3, "hit_tokens": 64}\n'
        '{"time": 2.0, "step": 8, "request": "a-0", "computed_tokens": 81, '
        '"held_blocks": 3}\n'
        '{"time": 3.0, "step": 9, "request": "a-0", "computed_tokens": 82, '
        '"held_blocks": 3, "hit_tokens": 80}\n'
    )

    (sequence,) = read_trace(trace, block_size=16).values()

    assert sequence.hit_tokens == 64
    assert sequence.full_tokens == [80, 96, 96]
    assert sequence.freed_tokens == 16
