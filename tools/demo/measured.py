# SPDX-License-Identifier: Apache-2.0
"""What the server says it did: its trace per request, and its `/metrics`.

Nothing here knows the plugin's arithmetic, so the table shows what happened, not what
should have.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tools.demo import DemoError


@dataclass
class Sequence:
    """One request's lines of the trace, in the order of the steps.

    Attributes:
        times: Seconds since the epoch.
        held_tokens: Tokens' worth of KV cache held, in whole blocks.
        full_tokens: What a cache that keeps everything holds, likewise.
        hit_tokens: Tokens of the prompt that it began behind, from the prefix cache.
    """

    times: list[float] = field(default_factory=list)
    held_tokens: list[int] = field(default_factory=list)
    full_tokens: list[int] = field(default_factory=list)
    hit_tokens: int = 0

    @property
    def freed_tokens(self) -> int:
        """What it gave back: what others gave back before a hit is none of its own."""
        first, last = (self.full_tokens[i] - self.held_tokens[i] for i in (0, -1))
        return last - first


@dataclass(frozen=True)
class Metrics:
    """The plugin's metrics, and the block size that vLLM chose."""

    freed_blocks: int
    peak_sequence_kv_tokens: int
    budget_tokens: int
    block_size: int


def read_trace(path: Path, block_size: int) -> dict[str, Sequence]:
    """Return the requests of a trace by the engine's name for them."""
    sequences: dict[str, Sequence] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        name = record["request"]
        # later only where a request comes back after a preemption
        hit = record.get("hit_tokens", 0)
        sequence = sequences.setdefault(name, Sequence(hit_tokens=hit))
        sequence.times.append(record["time"])
        sequence.held_tokens.append(block_size * record["held_blocks"])
        blocks = -(-record["computed_tokens"] // block_size)
        sequence.full_tokens.append(block_size * blocks)
    return sequences


def find_sequence(sequences: dict[str, Sequence], request_id: str) -> Sequence:
    """Return the sequence of a request.

    Args:
        sequences: From `read_trace`.
        request_id: The server's name, to which the engine appends something.

    Raises:
        DemoError: The trace has not exactly one such request.
    """
    found = [name for name in sequences if name.startswith(request_id)]
    if len(found) != 1:
        raise DemoError(f"the trace has {len(found)} requests named {request_id}.")
    return sequences[found[0]]


def scrape(url: str) -> Metrics:
    """Read `/metrics`.

    Raises:
        DemoError: The server does not answer, or shows no metric of the plugin.
    """
    try:
        text = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text
        samples = {
            sample.name: sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

        def ours(name: str) -> int:
            return int(samples[f"vllm:roco_{name}"].value)

        return Metrics(
            freed_blocks=ours("freed_blocks_total"),
            peak_sequence_kv_tokens=ours("peak_sequence_kv_tokens"),
            budget_tokens=ours("budget_tokens"),
            block_size=int(samples["vllm:cache_config_info"].labels["block_size"]),
        )
    except httpx.HTTPError as error:
        raise DemoError(f"{url}/metrics cannot be read: {error}") from error
    except KeyError as error:
        raise DemoError(f"{url}/metrics does not show {error}.") from error
