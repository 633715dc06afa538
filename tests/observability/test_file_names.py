# SPDX-License-Identifier: Apache-2.0
"""Whose numbers a file holds, where process numbers repeat."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import pytest

from vllm_roco.observability.file_names import FileName, process_name

Method = Literal["fork", "spawn"]

CONTAINER = """
import sys
from prometheus_client import REGISTRY, generate_latest
from tests.observability.publishing import publisher
from vllm_roco.observability.prometheus import register_collector

freed_blocks = int(sys.argv[1])
owned = publisher()
owned.publish(freed_blocks, 320)
register_collector()
print("ready", flush=True)
input()
for line in generate_latest(REGISTRY).decode().splitlines():
    if line.startswith("vllm:roco_freed_blocks_total"):
        print(line.split()[-1], flush=True)
input()
"""


def test_a_name_is_read_back() -> None:
    name = FileName.of_this_core("gauge_max", "17_dp1", 3)
    for written in (name, name.of_a_worker()):
        assert FileName.parse(str(written)) == written
    assert name.of_a_worker().core == name.core
    assert FileName.of_this_core("gauge_max", "17_dp1", 3) != name
    # what prometheus_client reads of it
    assert str(name).split("_")[:2] == ["gauge", "max"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "counter_17.db",
        "gauge_livemax_9.db",
        "9-0-other.metrics2",
        "counter_roco.db",
    ],
)
def test_other_names_are_not_ours(name: str) -> None:
    assert FileName.parse(name) is None
    ours = str(FileName.of_this_core("counter", "1", 0))
    assert FileName.parse(ours + ".a1b2c3") is None


def tell_names(connection: Connection) -> None:
    connection.send(
        (process_name(os.getpid()), FileName.of_this_core("counter", "1", 0))
    )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_knows_its_parent(method: Method) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context(method).Process(
        target=tell_names, args=(theirs,)
    )
    process.start()
    own_name, file_name = ours.recv()
    process.join(60)
    assert own_name != process_name(os.getpid())
    assert file_name.process == own_name
    assert file_name.parent == process_name(os.getpid())


def test_another_program_names_the_same_process_otherwise() -> None:
    code = (
        "from vllm_roco.observability.file_names import process_name\n"
        f"print(process_name({os.getpid()}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert len(run.stdout.strip()) == len(process_name(os.getpid()))
    assert run.stdout.strip() != process_name(os.getpid())


def test_containers_that_share_a_directory_are_told_apart() -> None:
    """In each of them the server was process 1, and both showed the sum of both."""
    unshare = [
        "unshare",
        "--user",
        "--map-root-user",
        "--pid",
        "--fork",
        "--mount-proc",
    ]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs PID namespaces: {error}")
    root = Path(__file__).parents[2]
    containers = [
        subprocess.Popen(
            [*unshare, sys.executable, "-c", CONTAINER, freed_blocks],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for freed_blocks in ("111", "222")
    ]
    for container in containers:
        assert container.stdout is not None
        assert container.stdout.readline() == "ready\n"
    seen = []
    for container in containers:
        assert container.stdin is not None and container.stdout is not None
        container.stdin.write("scrape\n")
        container.stdin.flush()
        seen.append(container.stdout.readline())
    for container in containers:
        container.communicate("end\n", timeout=60)
    assert seen == ["111.0\n", "222.0\n"]
