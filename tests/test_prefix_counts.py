# SPDX-License-Identifier: Apache-2.0
"""What clients, metrics and the trace tell of hits, over vLLM's real scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request

from tests.scheduler_driver import BLOCK_SIZE, Driver
from tests.test_prefix_scheduler import (
    LAST,
    PROMPT,
    cache_of,
    driver_of,
    hit_of,
    modes,
)
from vllm_roco.observability.families import PrefixCounts
from vllm_roco.observability.metrics import read_engines


def test_vllms_own_counters_know_of_hits() -> None:
    driver = driver_of()
    hit_of(driver, PROMPT)
    hit_of(driver, PROMPT)
    stats = [step.prefix_cache_stats for step in driver.stats]
    assert sum(step.requests for step in stats) == 2
    assert sum(step.queries for step in stats) == 2 * len(PROMPT)
    assert sum(step.hits for step in stats) == LAST


def shown(driver: Driver) -> PrefixCounts:
    """Return what the metrics tell."""
    (engine,) = read_engines(driver.scheduler.vllm_config.instance_id)
    return engine.prefix_cache


@pytest.mark.parametrize("windows", [(), (13,)], ids=["alone", "beside-windows"])
@modes
def test_clients_are_told_how_much_of_a_prompt_is_kept(
    asynchronous: bool, max_steps_in_flight: int, windows: tuple[int, ...]
) -> None:
    """Also of one that evicts, and beside windows, whose blocks bear no hashes."""
    driver = driver_of(
        asynchronous, max_steps_in_flight=max_steps_in_flight, windows=windows
    )

    def told(prompt: list[int], **more: Any) -> tuple[int, int]:
        """Return what vLLM answers: tokens from the cache, and newly left there."""
        name = driver.add(0, 1, prompt=prompt, **more)
        driver.drain(1000)
        stats = driver.finished[name].prefill_stats
        assert stats is not None
        return stats.num_cached_tokens, stats.num_cache_creation_tokens

    short = PROMPT[1:21]
    assert told(PROMPT) == (0, LAST)
    assert told(PROMPT) == (LAST, 0)
    # goes on to 108 tokens, and leaves a snapshot at 104
    assert told(PROMPT + [1] * 30) == (LAST, 104 - LAST)
    # without windows its blocks are found, the last one included
    assert told(short) == (0, 16 if windows else 20)
    assert told(PROMPT, cache_salt="another tenant's") == (0, LAST)
    # all blocks are handed out
    dead = cache_of(driver).store.num_dead
    pool = driver.manager.block_pool
    pool.free_blocks(pool.get_new_blocks(pool.get_num_free_blocks()))
    kept = driver.scheduler.kv_cache_manager.estimate_cached_tokens
    request = Request(
        request_id="asks",
        prompt_token_ids=PROMPT,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        cache_salt="another tenant's",
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )
    assert kept(request) == 0
    # nobody has looked for it
    assert cache_of(driver).store.num_dead == dead


def test_metrics_are_what_the_cache_counts() -> None:
    driver = driver_of(spare_blocks=30)
    assert shown(driver) == PrefixCounts()
    hit_of(driver, PROMPT)
    assert shown(driver) == PrefixCounts(live_snapshots=1, published_snapshots=1)
    for _ in range(3):
        driver.add(0, 5, prompt=PROMPT)
    # who waits for a prefix that is being read
    for _ in range(3):
        driver.add(0, 5, prompt=PROMPT[::-1])
    driver.drain(1000)
    assert shown(driver) == PrefixCounts(
        live_snapshots=2,
        published_snapshots=2,
        snapshot_hits=5,
        saved_tokens=5 * LAST,
        waits=2,
    )
    # others take the oldest blocks
    pool = driver.manager.block_pool
    pool.free_blocks(pool.get_new_blocks(pool.get_num_free_blocks() - 3))
    assert hit_of(driver, PROMPT) == 0
    assert shown(driver).dead_snapshots == 1
    counts = cache_of(driver).counts()
    assert shown(driver) == counts
    # idle, and nothing is scheduled after it
    assert driver.scheduler.reset_prefix_cache()
    assert shown(driver) == counts._replace(live_snapshots=0)


def test_a_reset_of_running_requests_shows_at_once() -> None:
    driver = driver_of()
    hit_of(driver, PROMPT)
    driver.add(0, 30, prompt=PROMPT)
    driver.step()
    instance = driver.scheduler.vllm_config.instance_id
    assert read_engines(instance)[0].max_sequence_kv_tokens > 0
    driver.preempt_all()
    (metrics,) = read_engines(instance)
    assert metrics.max_sequence_kv_tokens == 0
    assert metrics.prefix_cache.live_snapshots == 0


@modes
def test_the_trace_tells_of_hits(
    asynchronous: bool, max_steps_in_flight: int, tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    driver = driver_of(
        asynchronous, max_steps_in_flight=max_steps_in_flight, trace=str(path)
    )
    names = [driver.add(0, 30, prompt=PROMPT) for _ in range(2)]
    for _ in range(25):
        driver.step()
    request = driver.scheduler.requests[names[1]]
    assert request in driver.scheduler.running
    driver.scheduler.running.remove(request)
    driver.scheduler._preempt_request(request, 0.0)
    driver.drain(1000)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    begun = [line for line in lines if "hit_tokens" in line]
    # one waits, begins behind the other, and once more when it was preempted
    assert [(line["request"], line["hit_tokens"]) for line in begun] == [
        (names[0], 0),
        (names[1], LAST),
        (names[1], LAST),
    ]
    assert all(line["computed_tokens"] > line["hit_tokens"] for line in begun)
