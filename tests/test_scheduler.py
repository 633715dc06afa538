# SPDX-License-Identifier: Apache-2.0
"""Steps of vLLM's schedulers with RoCo's chunks, one situation at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.kv_cache_interface import KVCacheGroupSpec
from vllm.v1.structured_output import StructuredOutputManager

from tests.kv_cache.specs import one_group
from tests.scheduler_driver import BLOCK_SIZE, MAX_NUM_SEQS, Driver, Setup
from vllm_roco.observability.metrics import read_engines
from vllm_roco.scheduler import (
    RocoAsyncScheduler,
    RocoScheduler,
    RocoSchedulerMixin,
    describe,
)

# B 4, S 2, chunk 2 blocks
SYNCHRONOUS = Setup()
ASYNCHRONOUS = Setup(asynchronous=True, max_steps_in_flight=2)

both = pytest.mark.parametrize(
    "setup", [SYNCHRONOUS, ASYNCHRONOUS], ids=["sync", "async"]
)


def changed(setup: Setup, **changes: Any) -> Setup:
    return Setup(**{**vars(setup), **changes})


@both
def test_prompt_chunks_end_at_multiples_and_at_the_end(setup: Setup) -> None:
    driver = Driver(changed(setup, max_num_batched_tokens=500))
    request_id = driver.add(37)
    steps = [driver.step().get(request_id) for _ in range(4)]
    # nothing is evicted up to 23 tokens, so chunks begin at 16
    assert steps == [16, 8, 8, 5]


@both
def test_a_prompt_that_evicts_nothing_is_read_at_once(setup: Setup) -> None:
    driver = Driver(changed(setup, max_num_batched_tokens=500))
    request_id = driver.add(23)
    assert driver.step().get(request_id) == 23


@both
def test_a_chunk_waits_rather_than_end_elsewhere(setup: Setup) -> None:
    """12 tokens in a step: one whole chunk of 8, and no part of a second one."""
    driver = Driver(setup)
    first, second = driver.add(32), driver.add(32)
    steps = [driver.step() for _ in range(6)]
    assert [step.get(first) for step in steps] == [12, 4, 8, 8, None, None]
    assert [step.get(second) for step in steps] == [None, 8, None, None, 8, 8]


def test_the_end_of_one_prompt_leaves_room_for_another() -> None:
    driver = Driver(SYNCHRONOUS)
    first, second, third = driver.add(4), driver.add(8), driver.add(3)
    # 4 + 8 tokens fit into 12
    assert driver.step() == {first: 4, second: 8}
    assert driver.step() == {third: 3}


def test_a_whole_batch_of_decodes_leaves_room_for_a_chunk() -> None:
    driver = Driver(SYNCHRONOUS)
    decodes = [driver.add(1, 100) for _ in range(MAX_NUM_SEQS - 1)]
    driver.step()
    late = driver.add(100)
    # before the first eviction it takes what is left: 9 tokens, then the rest of 16
    for taken in (9, 7, 8, 8):
        assert driver.step() == {**dict.fromkeys(decodes, 1), late: taken}


def test_decodes_are_never_held_back() -> None:
    """Not even by a chunk that has no room."""
    driver = Driver(changed(SYNCHRONOUS, chunk=16, max_num_batched_tokens=20))
    first, second = driver.add(16, 50), driver.add(64, 50)
    third = driver.add(64, 50)
    driver.step()
    for _ in range(4):
        assert driver.step() == {first: 1, second: 16}
    assert driver.step() == {first: 1, second: 1, third: 16}


@both
def test_a_decode_step_is_one_token(setup: Setup) -> None:
    driver = Driver(setup)
    request_id = driver.add(8, 30)
    for _ in range(30):
        driver.step()
    driver.drain(10)
    assert len(driver.outputs[request_id]) == 30
    assert driver.num_steps <= 1 + 30 + 3


@both
@pytest.mark.parametrize("num_prompt_tokens", [1, 7, 8, 9, 100, 900])
def test_a_lone_prompt_larger_than_the_pool_is_served(
    setup: Setup, num_prompt_tokens: int
) -> None:
    """The pool has exactly the bound of one sequence."""
    driver = Driver(changed(setup, spare_blocks=0))
    request_id = driver.add(num_prompt_tokens, 50)
    driver.drain(num_prompt_tokens // 8 + 50 + 6)
    assert len(driver.outputs[request_id]) == 50


@both
def test_two_prompts_larger_than_the_pool_are_served(setup: Setup) -> None:
    driver = Driver(changed(setup, spare_blocks=3))
    first, second = driver.add(300, 60), driver.add(200, 60)
    driver.drain(400)
    assert len(driver.outputs[first]) == len(driver.outputs[second]) == 60


@both
def test_a_preempted_request_evicts_again_as_it_did(setup: Setup) -> None:
    """`PagedWorker` compares each eviction with that of the request alone."""
    driver = Driver(changed(setup, spare_blocks=6))
    requests = [driver.add(13 + 4 * index, 60) for index in range(4)]
    preemptions = 0
    while driver.scheduler.has_requests():
        driver.step()
        running = driver.scheduler.requests.values()
        preemptions = max([preemptions, *(r.num_preemptions for r in running)])
        assert driver.num_steps < 1000
    assert preemptions
    assert [len(driver.outputs[request_id]) for request_id in requests] == [60] * 4
    driver.drain(5)


@both
def test_evicting_requests_do_not_preempt_each_other(setup: Setup) -> None:
    """A request let in in the valley of a stride cost another one its cache."""
    # room for three at their peaks, of 7 blocks, and for four in the valley between
    spare = 3 * 7 - setup.spec().max_blocks_per_sequence
    driver = Driver(changed(setup, spare_blocks=spare, max_num_batched_tokens=500))
    for _ in range(6):
        driver.add(24, 60)
    requests = dict(driver.scheduler.requests)
    most = 0
    while driver.scheduler.has_unfinished_requests():
        driver.step()
        most = max(most, len(driver.scheduler.running))
    assert most >= 3
    assert [request.num_preemptions for request in requests.values()] == [0] * 6


def test_a_resumed_request_reads_its_outputs_in_chunks() -> None:
    """Prompt of 13, preempted with 40 known: free up to 23, then where E grows."""
    driver = Driver(SYNCHRONOUS)
    request_id = driver.add(13, 60)
    while len(driver.outputs[request_id]) < 27:
        driver.step()
    driver.preempt_all()
    ends = []
    computed = 0
    while computed < 40:
        computed += driver.step()[request_id]
        ends.append(computed)
    # the prompt's 8 and 13, multiples of 8, and E grows at 24, 32 and 40
    assert ends == [12, 23, 24, 32, 40]
    driver.drain(60)


@both
@pytest.mark.parametrize("num_steps", [0, 1, 2, 7, 20])
def test_an_aborted_request_gives_everything_back(setup: Setup, num_steps: int) -> None:
    driver = Driver(setup)
    request_id = driver.add(60, 40)
    for _ in range(num_steps):
        driver.step()
    driver.abort(request_id)
    driver.drain(4)


@both
def test_a_streaming_request_is_refused_alone(setup: Setup) -> None:
    driver = Driver(setup)
    other = driver.add(60, 5)
    driver.step()
    refused = driver.add(60, 5, resumable=True)
    driver.drain(30)
    assert driver.finished[refused].finish_reason is FinishReason.ERROR
    assert driver.outputs[refused] == []
    assert len(driver.outputs[other]) == 5


@both
def test_a_lone_streaming_request_is_answered(setup: Setup) -> None:
    driver = Driver(setup)
    refused = driver.add(60, 5, resumable=True)
    driver.drain(3)
    assert driver.finished[refused].finish_reason is FinishReason.ERROR


@both
@pytest.mark.parametrize("is_over", [True, False])
def test_nothing_is_kept_of_a_refused_stream(setup: Setup, is_over: bool) -> None:
    """A chunk that was sent before the client heard of its end is refused again.

    vLLM aborts the stream behind it, from 0.33 on because of the error and before if
    its client goes away, and does so twice: at once, and in the order of what was sent.
    """
    driver = Driver(setup)
    stream = driver.add(60, 5, resumable=True)
    driver.drain(3)
    scheduler = driver.scheduler
    assert scheduler._refused_streams == {stream}
    driver.abort(stream)
    assert scheduler._refused_streams == set()
    driver.add(20, 5, request_id=stream, resumable=True)
    assert scheduler._refused_streams == {stream}
    if is_over:
        # the input has ended as well
        driver.add(1, 5, request_id=stream)
    driver.abort(stream)
    assert scheduler._refused_streams == set()
    driver.drain(3)
    assert driver.outputs[stream] == []


@both
def test_a_refused_request_is_told_why_where_vllm_can_tell(setup: Setup) -> None:
    """From 0.33 on it can; the client got an HTTP 500 without a reason all the same."""
    driver = Driver(setup)
    refused = driver.add(60, 5, extra_args={"roco_budget": 9})
    driver.drain(3)
    answer: Any = driver.finished[refused]
    assert answer.finish_reason is FinishReason.ERROR
    if "error" in EngineCoreOutput.__struct_fields__:
        error = answer.error.to_exception()
        assert isinstance(error, VLLMValidationError)
        assert str(error).startswith("roco: budget = 9 is not a multiple of the block")


@both
def test_a_request_with_a_seed_of_its_own_is_refused_alone(setup: Setup) -> None:
    """Where the front end cannot tell whose it is; on a CPU it stopped the engine."""
    driver = Driver(setup)
    greedy = driver.add(60, 5, seed=7, temperature=0)
    refused = driver.add(60, 5, seed=7, temperature=1)
    driver.drain(30)
    assert driver.finished[refused].finish_reason is FinishReason.ERROR
    assert driver.outputs[refused] == []
    assert len(driver.outputs[greedy]) == 5


def test_equal_prompts_share_nothing() -> None:
    """Prefix caching is on in this configuration; `PagedWorker` checks every start."""
    driver = Driver(SYNCHRONOUS)
    for _ in range(3):
        driver.add(64, 8)
        driver.drain(30)
    pool = driver.scheduler.kv_cache_manager.block_pool
    assert all(block.block_hash is None for block in pool.blocks)


def test_a_scheduler_without_roco_layers_is_refused() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = SYNCHRONOUS.spec()
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=spec.dtype
    )
    config = SYNCHRONOUS.scheduler().vllm_config
    plan = one_group(spec, 20)
    plan.kv_cache_groups[0].kv_cache_spec = full
    with pytest.raises(ValueError, match="scheduler_cls = RocoScheduler .* no layer"):
        RocoScheduler(
            config, plan, StructuredOutputManager(config), block_size=BLOCK_SIZE
        )


@pytest.mark.parametrize("mode", ["both", "full"])
def test_unlike_layers_of_full_attention_are_refused(mode: str) -> None:
    """The engine began, and each request with options ended in an HTTP 500.

    A row counts in blocks of one size, and front ends know of no other.
    """
    setup = Setup(mode=mode, allow_full=True)
    spec = setup.spec()
    config = setup.scheduler().vllm_config
    plan = one_group(spec, 1000)
    larger = replace(spec, block_size=2 * BLOCK_SIZE)
    plan.kv_cache_groups.append(KVCacheGroupSpec(["another layer"], larger))
    with pytest.raises(NotImplementedError, match=r"several sizes \(\[4, 8\] tokens"):
        RocoScheduler(
            config,
            plan,
            StructuredOutputManager(config),
            block_size=2 * BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
        )


def test_front_ends_are_told_the_blocks_of_layers_that_evict() -> None:
    """They were told those of a window's layers, where vLLM makes these smaller."""
    setup = Setup(windows=(8,))
    config = setup.scheduler().vllm_config
    plan = setup.plan(config)
    *_, own = plan.kv_cache_groups
    own.kv_cache_spec = replace(
        own.kv_cache_spec, block_size=2 * BLOCK_SIZE, page_size_padded=None
    )
    RocoScheduler(
        config,
        plan,
        StructuredOutputManager(config),
        block_size=2 * BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )
    assert config.cache_config.block_size == 2 * BLOCK_SIZE


@pytest.mark.parametrize("scheduler", [RocoScheduler, RocoAsyncScheduler])
def test_the_start_up_check_knows_the_schedulers(
    scheduler: type[RocoSchedulerMixin],
) -> None:
    assert scheduler.ends_roco_chunks


def test_the_start_up_line_says_what_holds() -> None:
    # B 4, S 2, a chunk of 2 blocks and 1
    assert describe(SYNCHRONOUS.scheduler()) == (
        "RoCo: policy roco (contribution shield, ratio 1), budget 16 tokens per "
        "sequence, stride 8, chunk 8, block size 4. A sequence attends over at most 23 "
        "tokens after a step and holds at most 36 tokens of KV cache. Prefix caching: "
        "off (enable_prefix_caching = False). Switched off: speculative decoding, "
        "KV connectors."
    )


def metrics_of(driver: Driver) -> Any:
    (engine,) = read_engines(driver.scheduler.vllm_config.instance_id)
    return engine


@both
@pytest.mark.parametrize("num_prompt_tokens", [10, 187, 192])
def test_what_is_freed_can_be_worked_out(setup: Setup, num_prompt_tokens: int) -> None:
    """As docs/observability.md does."""
    setup = changed(setup, stride=4, chunk=24)
    # of fewer the step before the last may have been a prompt's
    for num_tokens in range(3 if setup.asynchronous else 2, 12):
        driver = Driver(setup)
        driver.add(num_prompt_tokens, num_tokens)
        driver.drain(100)
        evicted = driver.manager.plans.default.schedule.evicted_blocks
        length = num_prompt_tokens + num_tokens
        ends = {length - 2, length - 3 if setup.asynchronous else length - 2}
        assert driver.manager.num_freed_blocks in map(evicted, ends)


def test_metrics_are_what_the_manager_counts() -> None:
    driver = Driver(SYNCHRONOUS)
    first, second = driver.add(60, 30), driver.add(10, 3)
    peak = 0
    while driver.scheduler.has_requests():
        driver.schedule()
        most = max(map(driver.manager.held_blocks, (first, second)))
        peak = max(peak, most)
        metrics = metrics_of(driver)
        assert metrics.budget_tokens == 16
        assert metrics.max_sequence_kv_tokens == most * BLOCK_SIZE
        assert metrics.freed_blocks == driver.manager.num_freed_blocks
        driver.complete()
    metrics = metrics_of(driver)
    assert metrics.max_sequence_kv_tokens == 0
    assert metrics.peak_sequence_kv_tokens == peak * BLOCK_SIZE
    # blocks of finished requests do not count: at most what eviction took
    assert (
        0
        < metrics.freed_blocks
        <= driver.manager.plans.default.schedule.evicted_blocks(89)
    )
    driver.scheduler.shutdown()
    assert not read_engines(driver.scheduler.vllm_config.instance_id)


@both
def test_the_trace_is_read_from_the_rows(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    driver = Driver(changed(setup, trace=str(path)))
    driver.add(30, 12)
    driver.add(5, 9)
    expected = []
    while driver.scheduler.has_requests():
        for request_id in driver.schedule():
            request = driver.scheduler.requests[request_id]
            expected.append(
                (
                    driver.num_steps,
                    request_id,
                    request.num_computed_tokens,
                    driver.manager.held_blocks(request_id),
                )
            )
        driver.complete()
    driver.scheduler.shutdown()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [
        (line["step"], line["request"], line["computed_tokens"], line["held_blocks"])
        for line in written
    ] == expected
    first = {line["request"]: line for line in reversed(written)}
    begun = [line for line in written if "hit_tokens" in line]
    assert begun == sorted(first.values(), key=written.index)
    assert [line["hit_tokens"] for line in begun] == [0, 0]
