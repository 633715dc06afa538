# SPDX-License-Identifier: Apache-2.0
"""The Python files of releases that are not installed."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.releases import release_path
from tools.releases import (
    fetch_release,
    installed_release,
    need_release,
    other_releases,
)
from vllm_roco.compat import TESTED_VLLM


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index; releases are kept in an empty one."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("ROCO_RELEASES", str(tmp_path / "releases"))
    return folder


def test_keeps_the_python_files_of_a_wheel(index: Path, tmp_path: Path) -> None:
    info = "vllm-9.0.0.dist-info"
    with zipfile.ZipFile(index / "vllm-9.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("vllm/__init__.py", "")
        wheel.writestr("vllm/v1/request.py", "REQUEST = 1\n")
        wheel.writestr("vllm/_C.abi3.so", "compiled")
        wheel.writestr(f"{info}/METADATA", "Name: vllm\nVersion: 9.0.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\n")
    folder = fetch_release("9.0.0")
    kept = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(folder)) for path in kept) == [
        f"{info}/METADATA",
        f"{info}/WHEEL",
        "vllm/__init__.py",
        "vllm/v1/request.py",
    ]
    # neither the wheel nor a half-made folder stays
    assert [*folder.parent.iterdir()] == [folder] == [need_release("9.0.0")]


def test_leaves_nothing_where_the_wheel_is_not_to_be_had(
    index: Path, tmp_path: Path
) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        fetch_release("9.0.0")
    assert [*(tmp_path / "releases").iterdir()] == []
    with pytest.raises(FileNotFoundError, match="9.0.0.*python -m tools.releases"):
        need_release("9.0.0")


def test_a_missing_release_fails_in_ci_and_skips_elsewhere(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="python -m tools.releases"):
        release_path("9.0.0")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(FileNotFoundError):
        release_path("9.0.0")


def test_one_release_is_installed_and_the_others_are_not() -> None:
    assert installed_release() in TESTED_VLLM
    assert sorted([*other_releases(), str(installed_release())]) == [*TESTED_VLLM]
    package = release_path(str(installed_release())) / "vllm"
    assert (package / "_version.py").is_file()
