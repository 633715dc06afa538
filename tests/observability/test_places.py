# SPDX-License-Identifier: Apache-2.0
"""Where files of numbers lie when the usual place is somebody else's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.observability.conftest import Warnings
from tests.observability.publishing import publisher
from vllm_roco.observability.metrics import read_engines
from vllm_roco.observability.places import places
from vllm_roco.observability.publisher import MovedBlocks


def be_a_link(directory: Path) -> None:
    elsewhere = directory.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    directory.symlink_to(elsewhere)


def be_a_file(directory: Path) -> None:
    directory.touch(mode=0o600)


def be_readable(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o755)


def be_another_users(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a directory away")
    directory.mkdir(mode=0o700)
    os.chown(directory, 12345, 12345)


taken = pytest.mark.parametrize(
    "take", [be_a_link, be_a_file, be_readable, be_another_users]
)


@taken
def test_a_directory_that_others_control_is_left_alone(
    take: Callable[[Path], None], directory: Path, warnings: Warnings
) -> None:
    """Anybody could make the directory first, and no engine of this user started."""
    take(directory)
    with contextlib.closing(publisher()) as owned:
        moved = MovedBlocks("1", 0)
        owned.publish(5, 80)
        moved.add(3)
        (metrics,) = read_engines()
        if directory.is_dir():
            assert list(directory.iterdir()) == []
    assert (metrics.freed_blocks, metrics.moved_blocks) == (5, 3)
    (warning,) = warnings.messages
    assert f"{directory} must be a directory of user {os.geteuid()}" in warning


@taken
def test_a_directory_that_others_control_is_not_read(
    take: Callable[[Path], None], directory: Path
) -> None:
    with contextlib.closing(publisher()):
        directory.rename(directory.with_name("kept"))
        take(directory)
        if directory.is_dir():
            for path in directory.with_name("kept").iterdir():
                path.rename(directory / path.name)
        assert read_engines() == ()


def test_without_any_place_the_reasons_are_told(directory: Path) -> None:
    be_a_file(directory)
    cache = Path(os.environ["XDG_CACHE_HOME"])
    cache.touch()
    with pytest.raises(OSError, match=rf"(?s){directory} must.*{cache}.*Set TMPDIR"):
        publisher()
    assert read_engines() == ()


def test_a_user_without_a_home_has_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert len(list(places())) == 1
    with contextlib.closing(publisher()):
        assert len(read_engines()) == 1


def test_nothing_is_made_before_an_engine_publishes(directory: Path) -> None:
    assert read_engines() == ()
    assert not MovedBlocks("1", 0).connect()
    assert not directory.exists()
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists()
