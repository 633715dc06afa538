# SPDX-License-Identifier: Apache-2.0
"""An engine's numbers, between real processes that live and die."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import pytest

from tests.observability.publishing import distribution, prefix_counts, publisher
from vllm_roco.observability import publisher as publisher_module
from vllm_roco.observability.families import (
    PREFIX_FAMILIES,
    REQUEST_BOUND,
    Distribution,
    PrefixCounts,
)
from vllm_roco.observability.file import find_files
from vllm_roco.observability.file_names import FileName
from vllm_roco.observability.metrics import RocoMetrics, get_metrics, read_engines
from vllm_roco.observability.places import Place
from vllm_roco.observability.publisher import MovedBlocks

Method = Literal["fork", "spawn"]

# every byte of the number changes between the two
TORN_NUMBERS = tuple(
    int(struct.unpack(">d", bytes.fromhex(digits))[0])
    for digits in ("43123456789abcde", "4265a9b8c7d6e5f4")
)


def run_engine(engine: int, ready: Connection) -> None:
    """Publish once, then live until the parent says so or kills."""
    owned = publisher(engine)
    owned.publish(10 + engine, 80)
    ready.send(os.getpid())
    ready.recv()
    owned.close()


def run_torn_writer(ready: Connection) -> None:
    """Alternate between two numbers as fast as possible."""
    owned = publisher()
    owned.publish(TORN_NUMBERS[0], TORN_NUMBERS[0])
    ready.send(True)
    while not ready.poll():
        for number in TORN_NUMBERS:
            owned.publish(number, number)
    owned.close()


@contextlib.contextmanager
def started(
    method: Method, target: object, *args: object
) -> Iterator[tuple[BaseProcess, Connection]]:
    """Run `target(*args, connection)` in a child that has reported itself ready."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*args, theirs))
    process.start()
    try:
        assert ours.poll(120), "the child did not start"
        ours.recv()
        yield process, ours
    finally:
        with contextlib.suppress(BrokenPipeError):
            ours.send("stop")
        process.join(30)
        assert process.exitcode is not None


def test_a_new_engine_shows_zeros() -> None:
    with contextlib.closing(publisher()):
        (metrics,) = read_engines()
    assert (metrics.engine, metrics.model_name, metrics.budget_tokens) == (0, "m", 64)
    assert metrics.freed_blocks == metrics.moved_blocks == 0
    assert metrics.max_sequence_kv_tokens == metrics.peak_sequence_kv_tokens == 0
    assert metrics.prefix_cache == PrefixCounts()
    assert metrics.request_bounds == distribution()
    assert metrics.peak_request_bound_tokens == 0


def test_every_field_of_the_prefix_counts_is_a_metric() -> None:
    fields = [family.field for family in PREFIX_FAMILIES]
    assert fields == [f"prefix_cache.{field}" for field in PrefixCounts._fields]
    gauges = [family.name for family in PREFIX_FAMILIES if not family.is_counter]
    assert gauges == ["vllm:roco_prefix_live_snapshots"]
    assert all(family.documentation.endswith(".") for family in PREFIX_FAMILIES)


def test_snapshots_come_and_go() -> None:
    with contextlib.closing(publisher()) as owned:
        for live, published in ((1, 1), (2, 2), (0, 2)):
            owned.publish_prefixes(PrefixCounts(live, published))
            (metrics,) = read_engines()
            assert metrics.prefix_cache == PrefixCounts(live, published)


def test_the_peak_outlives_the_request() -> None:
    with contextlib.closing(publisher()) as owned:
        for freed_blocks, tokens in ((0, 48), (4, 96), (6, 80), (6, 0)):
            owned.publish(freed_blocks, tokens)
        (metrics,) = read_engines()
    assert metrics.freed_blocks == 6
    assert metrics.max_sequence_kv_tokens == 0
    assert metrics.peak_sequence_kv_tokens == 96


def test_engines_are_summed_and_sorted() -> None:
    with (
        contextlib.closing(publisher(engine=1)) as second,
        contextlib.closing(publisher(engine=0)) as first,
    ):
        first.publish(3, 64)
        second.publish(5, 96)
        first.publish_prefixes(prefix_counts(2))
        second.publish_prefixes(prefix_counts(3))
        workers = [MovedBlocks("1", engine) for engine in (0, 1)]
        workers[0].add(2)
        workers[1].add(4)
        metrics = RocoMetrics(engines=read_engines())
    assert [engine.engine for engine in metrics.engines] == [0, 1]
    assert [engine.moved_blocks for engine in metrics.engines] == [2, 4]
    assert metrics.freed_blocks == 8
    assert metrics.moved_blocks == 6
    assert metrics.max_sequence_kv_tokens == metrics.peak_sequence_kv_tokens == 96
    assert metrics.budget_tokens == 64
    assert metrics.engines[1].prefix_cache == prefix_counts(3)
    assert metrics.prefix_cache == prefix_counts(5)


def test_bounds_of_requests_are_counted() -> None:
    with (
        contextlib.closing(publisher(engine=0)) as first,
        contextlib.closing(publisher(engine=1)) as second,
    ):
        sizes = [16, 128, 129, 2**20 + 16, 4368, 2**20]
        for size in sizes:
            first.count_request(size)
        second.count_request(128)
        metrics = RocoMetrics(engines=read_engines())
    assert metrics.engines[0].request_bounds == distribution(*sizes)
    assert metrics.engines[1].request_bounds == distribution(128)
    assert metrics.peak_request_bound_tokens == 2**20 + 16
    assert metrics.engines[1].peak_request_bound_tokens == 128
    assert metrics.request_bounds == distribution(*sizes, 128)
    counts = dict(zip(REQUEST_BOUND.labels, metrics.request_bounds.counts, strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {
        **{"128.0": 3, "160.0": 1, "5120.0": 1, "1.048576e+06": 1, "+Inf": 1}
    }
    assert isinstance(metrics.request_bounds, Distribution)
    assert metrics.request_bounds.total == sum(sizes) + 128


def test_buckets_tell_bounds_a_quarter_apart() -> None:
    """P95 of requests that may all hold 4,368 tokens was said to be 7,987."""
    bounds = REQUEST_BOUND.bounds
    assert (bounds[0], bounds[-1], len(bounds)) == (128, 2**20, 53)
    assert all(more <= least * 1.25 for least, more in pairwise(bounds))
    assert all(bound % 32 == 0 for bound in bounds)


def test_instances_are_told_apart() -> None:
    with (
        contextlib.closing(publisher(instance_id="1")) as one,
        contextlib.closing(publisher(instance_id="2")),
    ):
        one.publish(3, 64)
        assert [engine.freed_blocks for engine in read_engines("1")] == [3]
        assert [engine.freed_blocks for engine in read_engines("2")] == [0]
        assert len(read_engines()) == 2
        assert read_engines("3") == ()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_parent_reads_its_engine_processes(method: Method) -> None:
    with started(method, run_engine, 0), started(method, run_engine, 1):
        assert [engine.freed_blocks for engine in read_engines()] == [10, 11]
    assert read_engines() == ()


def run_worker(method: Method, connection: Connection) -> None:
    """Be an engine core with a worker that is a process of its own."""
    with contextlib.closing(publisher(engine=1)) as owned:
        owned.publish(5, 80)
        with started(method, move_blocks):
            owned.publish(6, 96)
            connection.send(True)
            connection.recv()


def move_blocks(ready: Connection) -> None:
    moved = MovedBlocks("1", 1)
    for num_blocks in (3, 0, 4):
        moved.add(num_blocks)
    ready.send(True)
    ready.recv()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_counts_for_its_engine(method: Method) -> None:
    with contextlib.closing(publisher()), started(method, run_worker, method):
        assert [engine.moved_blocks for engine in read_engines()] == [0, 7]
        assert [engine.freed_blocks for engine in read_engines()] == [0, 6]


def test_moves_do_not_count_before_their_engine_serves() -> None:
    moved = MovedBlocks("1", 0)
    moved.add(9)
    with (
        contextlib.closing(publisher(engine=1)),
        contextlib.closing(publisher(instance_id="2")),
    ):
        assert not moved.connect()
        moved.add(9)
        with contextlib.closing(publisher()):
            assert moved.connect()
            moved.add(2)
            assert [engine.moved_blocks for engine in read_engines("1")] == [2, 0]
        # an engine that has gone is no reason for its worker to fail
        moved.add(1)
        assert [engine.moved_blocks for engine in read_engines()] == [0, 0]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one when somebody looks for the files of an engine core."""
    looks: list[None] = []

    def look() -> Iterator[tuple[Place, FileName]]:
        looks.append(None)
        return find_files()

    monkeypatch.setattr(publisher_module, "find_files", look)
    return looks


def test_steps_do_not_look_again_for_an_engine_that_is_not_there(
    looks: list[None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step listed and parsed all files, which took up to a millisecond of it."""
    monkeypatch.setattr(publisher_module, "CHECK_SECONDS", 1e9)
    moved = MovedBlocks("1", 0)
    for _ in range(50):
        assert not moved.connect()
    assert len(looks) == 1
    with contextlib.closing(publisher(engine=1)):
        os.utime(directory, (1, 1))
        for _ in range(50):
            assert not moved.connect()
        assert len(looks) == 2
        with contextlib.closing(publisher()):
            assert moved.connect()


def test_a_clock_that_was_set_back_lets_no_step_look_and_changes_show(
    looks: list[None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "CHECK_SECONDS", 1e9)
    moved = MovedBlocks("1", 0)
    with contextlib.closing(publisher(engine=1)):
        an_hour_ahead = time.time() + 3600
        os.utime(directory, (an_hour_ahead, an_hour_ahead))
        for _ in range(50):
            assert not moved.connect()
        assert len(looks) == 1
        with contextlib.closing(publisher()):
            assert moved.connect()


def test_a_change_that_does_not_show_is_not_missed(
    looks: list[None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine's files may come at the tick at which another's were looked at."""
    with contextlib.closing(publisher(engine=1)):
        moved = MovedBlocks("1", 0)
        for tick, due, num_looks in ((10**18, 1e9, 3), (-(10**18), 0.0, 6)):
            monkeypatch.setattr(publisher_module, "TICK_NANOSECONDS", tick)
            monkeypatch.setattr(publisher_module, "CHECK_SECONDS", due)
            for _ in range(3):
                assert not moved.connect()
            assert len(looks) == num_looks


def run_front_end(connection: Connection) -> None:
    """Be a child of some program, with the engine core in this very process."""
    with contextlib.closing(publisher()) as owned:
        owned.publish(5, 80)
        connection.send([engine.freed_blocks for engine in read_engines("1")])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_reads_the_engine_inside_it(method: Method) -> None:
    """It looked for engines of its own number, and they bore its parent's."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context(method).Process(
        target=run_front_end, args=(theirs,)
    )
    process.start()
    assert ours.poll(120)
    assert ours.recv() == [5]
    process.join(60)


def test_another_programs_engines_are_not_ours(directory: Path) -> None:
    code = (
        "from vllm_roco.observability.metrics import read_engines\n"
        "from vllm_roco.observability.publisher import MetricsPublisher\n"
        "owned = MetricsPublisher("
        "instance_id='1', engine=0, model_name='m', budget_tokens=64)\n"
        "print(len(read_engines()), flush=True)\n"
        "input()\n"
    )
    with (
        contextlib.closing(publisher()),
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other,
    ):
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        assert len(list(directory.iterdir())) == 6
        assert len(read_engines()) == 1
        other.communicate("\n")
    # the other one never closed its publisher: its exit did
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_killed_engine_is_not_read_and_is_swept(
    method: Method, directory: Path
) -> None:
    with started(method, run_engine, 0) as (process, _):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        # not joined yet: a zombie must not count as alive
        deadline = time.monotonic() + 30
        while read_engines():
            assert time.monotonic() < deadline, "a killed engine is still read"
    leftovers = set(directory.iterdir())
    assert len(leftovers) == 3
    with contextlib.closing(publisher(engine=7)):
        assert [engine.engine for engine in read_engines()] == [7]
        assert leftovers.isdisjoint(directory.iterdir())


def test_a_folder_among_the_files_is_left_alone(directory: Path) -> None:
    publisher().close()
    folder = directory / "folder"
    folder.mkdir()
    with contextlib.closing(publisher(engine=7)):
        assert [engine.engine for engine in read_engines()] == [7]
    assert folder.is_dir()


def test_engines_that_start_together_do_not_sweep_each_other() -> None:
    code = (
        "from vllm_roco.observability.metrics import read_engines\n"
        "from vllm_roco.observability.publisher import MetricsPublisher\n"
        "for engine in range(300):\n"
        "    owned = MetricsPublisher("
        "instance_id='1', engine=engine, model_name='m', budget_tokens=64)\n"
        "    assert [metrics.engine for metrics in read_engines()] == [engine]\n"
        "    owned.close()\n"
    )
    programs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [program.wait(60) for program in programs] == [0] * 4


def test_a_reader_never_sees_half_a_number() -> None:
    seen = set()
    with started("fork", run_torn_writer):
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            (metrics,) = read_engines()
            seen |= {metrics.freed_blocks, metrics.max_sequence_kv_tokens}
    assert seen == set(TORN_NUMBERS)


def test_closing_removes_the_files_and_may_be_repeated(directory: Path) -> None:
    owned = publisher()
    assert len(list(directory.iterdir())) == 3
    owned.close()
    owned.close()
    assert list(directory.iterdir()) == []
    assert read_engines() == ()


def test_a_dropped_publisher_removes_its_files(directory: Path) -> None:
    owned = publisher()
    del owned
    assert list(directory.iterdir()) == []


def test_a_forked_child_leaves_the_files_alone() -> None:
    with contextlib.closing(publisher()) as owned:
        child = multiprocessing.get_context("fork").Process(target=owned.close)
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert len(read_engines()) == 1


def test_get_metrics_says_why_there_are_none() -> None:
    @dataclass
    class Engine:
        vllm_config: object

    from vllm.config import VllmConfig

    with pytest.raises(RuntimeError, match=r"no running engine .* backend is None"):
        get_metrics(Engine(VllmConfig()))  # type: ignore[arg-type]
