# SPDX-License-Identifier: Apache-2.0
"""What `tools/setup_env.sh` does with a `.venv` that is a link."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A second checkout, as far as setting up reads it."""
    tools = tmp_path / "checkout" / "tools"
    shutil.copytree(ROOT / "tools" / "vllm_cpu_alias", tools / "vllm_cpu_alias")
    shutil.copy(ROOT / "tools" / "setup_env.sh", tools)
    shutil.copy(ROOT / "pyproject.toml", tools.parent)
    return tools.parent


def set_up(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Set up for tests, and print which Python is used then and which code goes first.

    Offline, so that an environment begun by mistake ends soon.
    """
    environment = os.environ | {"PIP_NO_INDEX": "1", "PYTHONPATH": "/elsewhere"}
    environment.pop("ROCO_PYTHON", None)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c"]
        + ['source tools/setup_env.sh; setup_env test; echo "$PYTHON $PYTHONPATH"'],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_linked_environment_is_used_as_it_is(checkout: Path, tmp_path: Path) -> None:
    """Taken for one of this checkout's that is out of date, the link would be removed,
    and gigabytes installed in its place."""
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "python").symlink_to(sys.executable)
    # as an environment looks that another checkout has made
    (other / ".roco-made").touch()
    (other / ".roco-base").write_text("of another checkout")
    link = checkout / ".venv"
    link.symlink_to(other)

    done = set_up(checkout)

    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{link}/bin/python {checkout}:/elsewhere\n"
    assert f".venv is a link to {other}, which is used as it is" in done.stderr
    assert link.is_symlink()
    assert sorted(os.listdir(other)) == [".roco-base", ".roco-made", "bin"]


def test_link_to_no_environment_is_told(checkout: Path, tmp_path: Path) -> None:
    link = checkout / ".venv"
    link.symlink_to(tmp_path / "gone")

    done = set_up(checkout)

    assert done.returncode == 1
    assert f"link to {tmp_path / 'gone'}, where no bin/python runs" in done.stderr
    assert link.is_symlink()
