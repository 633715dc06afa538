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
        block_size: Tokens per block.
        times: Seconds since the epoch.
        computed_tokens: Tokens that have been read or written.
        held_blocks: Blocks that vLLM's block manager holds for it.
    """

    block_size: int
    times: list[float] = field(default_factory=list)
    computed_tokens: list[int] = field(default_factory=list)
    held_blocks: list[int] = field(default_factory=list)

    @property
    def held_tokens(self) -> list[int]:
        """Tokens' worth of KV cache held at each step."""
        return [blocks * self.block_size for blocks in self.held_blocks]

    @property
    def full_tokens(self) -> list[int]:
        """What a cache that keeps everything holds at each step, in whole blocks."""
        return [self.block_size * blocks for blocks in self._full_blocks()]

    @property
    def freed_blocks(self) -> int:
        """Blocks that it once needed and did not hold in its last step."""
        return self._full_blocks()[-1] - self.held_blocks[-1]

    def _full_blocks(self) -> list[int]:
        return [-(-tokens // self.block_size) for tokens in self.computed_tokens]


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
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            sequence = sequences.setdefault(record["request"], Sequence(block_size))
            sequence.times.append(record["time"])
            sequence.computed_tokens.append(record["computed_tokens"])
            sequence.held_blocks.append(record["held_blocks"])
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
    except httpx.HTTPError as error:
        raise DemoError(f"{url}/metrics cannot be read: {error}") from error
    samples = {
        sample.name: sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    try:
        return Metrics(
            freed_blocks=int(samples["vllm:roco_freed_blocks_total"].value),
            peak_sequence_kv_tokens=int(
                samples["vllm:roco_peak_sequence_kv_tokens"].value
            ),
            budget_tokens=int(samples["vllm:roco_budget_tokens"].value),
            block_size=int(samples["vllm:cache_config_info"].labels["block_size"]),
        )
    except KeyError as error:
        raise DemoError(f"{url}/metrics does not show {error}.") from error
