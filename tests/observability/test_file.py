# SPDX-License-Identifier: Apache-2.0
"""Files of numbers that are damaged, strange, or gone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.observability.conftest import Warnings
from tests.observability.publishing import prefix_counts, publisher
from vllm_roco.observability import publisher as publisher_module
from vllm_roco.observability.file_names import FileName
from vllm_roco.observability.metrics import read_engines
from vllm_roco.observability.prometheus import RocoCollector
from vllm_roco.observability.publisher import MovedBlocks


@contextlib.contextmanager
def locked(path: Path, content: bytes) -> Iterator[None]:
    """Be a process that lives, and has written such a file."""
    path.write_bytes(content)
    with path.open("rb") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        yield


def of_another_release() -> bytes:
    """A file of this package before it used prometheus_client's format."""
    identity = {"instance_id": "1", "frontend_pid": os.getpid(), "engine": 0, "new": 3}
    return bytes(32) + json.dumps(identity).encode()


def damage(content: bytes, what: str) -> bytes:
    used = int.from_bytes(content[:4], sys.byteorder)
    return {
        "empty": b"",
        "a-byte": content[:1],
        "cut-in-a-key": content[:60],
        "cut-in-the-last-number": content[: used - 9],
        "zeros-behind": content[:60] + bytes(len(content) - 60),
        "text": b"freed 3\n" * 100,
        "ones": b"\xff" * 4096,
        "other-labels": content.replace(b'"engine"', b'"enigma"'),
        "no-number": content.replace(content[used - 16 : used], b"\xff" * 16),
    }[what]


DAMAGES = (
    "empty",
    "a-byte",
    "cut-in-a-key",
    "cut-in-the-last-number",
    "zeros-behind",
    "text",
    "ones",
    "other-labels",
    "no-number",
)


def scrape() -> str:
    registry = CollectorRegistry()
    registry.register(RocoCollector())
    return generate_latest(registry).decode()


def test_a_file_of_another_release_is_passed_over(directory: Path) -> None:
    """One more field in it broke `/metrics` of every vLLM process of its user."""
    with (
        contextlib.closing(publisher()) as owned,
        locked(directory / "9-0-other.metrics2", of_another_release()),
    ):
        owned.publish(5, 80)
        moved = MovedBlocks("1", 0)
        moved.add(2)
        assert 'freed_blocks_total{engine="0",model_name="m"} 5.0' in scrape()
        assert 'moved_blocks_total{engine="0",model_name="m"} 2.0' in scrape()
        assert not MovedBlocks("another", 0).connect()


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_file_is_passed_over(what: str, directory: Path) -> None:
    with contextlib.closing(publisher(engine=1)) as damaged:
        damaged.publish(3, 48)
        names = [path.name for path in directory.iterdir()]
        contents = [(directory / name).read_bytes() for name in names]
    with contextlib.ExitStack() as stack:
        owned = stack.enter_context(contextlib.closing(publisher()))
        owned.publish(5, 80)
        for name, content in zip(names, contents, strict=True):
            stack.enter_context(locked(directory / name, damage(content, what)))
        assert [engine.freed_blocks for engine in read_engines()] == [5]
        assert scrape().count("freed_blocks_total{") == 1
        # the worker of the damaged one takes no harm either
        moved = MovedBlocks("1", 1)
        moved.connect()
        moved.add(1)


def test_what_is_no_file_is_passed_over(directory: Path) -> None:
    with contextlib.closing(publisher()):
        pipe, folder, link = (
            directory / str(FileName.of_this_core("counter", "1", engine))
            for engine in (1, 2, 3)
        )
        os.mkfifo(pipe)
        folder.mkdir()
        link.symlink_to("/dev/zero")
        assert [engine.engine for engine in read_engines()] == [0]
        with contextlib.closing(publisher(engine=4)):
            assert [engine.engine for engine in read_engines()] == [0, 4]


def remove_files(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


@pytest.mark.parametrize("sweep", [remove_files, shutil.rmtree])
def test_numbers_come_back_after_a_sweep(
    sweep: Callable[[Path], None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something swept the temporary directory, and nothing was seen from then on."""
    monkeypatch.setattr(publisher_module, "CHECK_SECONDS", 0.0)
    with contextlib.closing(publisher()) as owned:
        moved = MovedBlocks("1", 0)
        owned.publish(5, 80)
        owned.publish_prefixes(prefix_counts(1))
        moved.add(3)
        sweep(directory)
        assert read_engines() == ()
        # which nobody sees before the files are there again
        owned.publish_prefixes(prefix_counts(2))
        owned.publish(6, 64)
        moved.add(1)
        (metrics,) = read_engines()
        assert (metrics.freed_blocks, metrics.moved_blocks) == (6, 4)
        assert metrics.max_sequence_kv_tokens == 64
        assert metrics.peak_sequence_kv_tokens == 80
        assert metrics.budget_tokens == 64
        assert metrics.prefix_cache == prefix_counts(2)
        # the new files are as good as the old ones
        owned.publish(7, 48)
        owned.publish_prefixes(prefix_counts(3))
        moved.add(1)
        (metrics,) = read_engines()
        assert (metrics.freed_blocks, metrics.moved_blocks) == (7, 5)
        assert metrics.prefix_cache == prefix_counts(3)
    assert read_engines() == ()


def test_a_look_in_each_step_would_cost_the_scheduler(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "CHECK_SECONDS", 3600.0)
    with contextlib.closing(publisher()) as owned:
        owned.publish(1, 16)
        remove_files(directory)
        for freed_blocks in range(2, 100):
            owned.publish(freed_blocks, 16)
        assert list(directory.iterdir()) == []


def test_a_worker_that_cannot_write_goes_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch, warnings: Warnings
) -> None:
    monkeypatch.setattr(publisher_module, "CHECK_SECONDS", 0.0)
    with contextlib.closing(publisher()):
        moved = MovedBlocks("1", 0)
        moved.add(3)
        directory.chmod(0o755)
        remove_files(directory)
        for _ in range(3):
            moved.add(1)
        assert not moved.connect()
    (warning,) = warnings.messages
    assert "moved blocks ends here, and the engine goes on without" in warning


NO_ROOM = """
import sys
from tests.observability.publishing import prefix_counts, publisher
from vllm_roco.observability.metrics import read_engines
from vllm_roco.observability.publisher import MovedBlocks

owned = publisher()
try:
    with open(sys.argv[1], "wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
except OSError as error:
    print(error)
owned.publish(5, 80)
moved = MovedBlocks("1", 0)
moved.add(3)
assert not moved.connect()
try:
    publisher(engine=1)
except OSError as error:
    print(error)
(metrics,) = read_engines()
assert (metrics.freed_blocks, metrics.moved_blocks) == (5, 0)
owned.close()
"""


def test_a_full_disk_is_an_error_and_kills_nobody(directory: Path) -> None:
    """A store into a hole of a mapped file is fatal when the disk has no room for it.

    So files are filled before they are mapped.
    """
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    small = "mount -t tmpfs -o size=32k none"
    temporary = directory.parent
    cache = Path(os.environ["XDG_CACHE_HOME"])
    cache.mkdir()
    try:
        command = [*namespace, "sh", "-c", f"{small} {temporary}"]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs mounts in a namespace: {error}")
    # and no other place
    (cache / directory.name).touch()
    run = subprocess.run(
        [
            *namespace,
            "sh",
            "-c",
            f'{small} {temporary} && exec "$0" -c "$1" {temporary}/all-that-is-left',
            sys.executable,
            NO_ROOM,
        ],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run
    assert run.stdout.count("No space left on device") == 2
    assert "moved blocks ends here" in run.stderr
