# SPDX-License-Identifier: Apache-2.0
"""A copy of a vLLM release in which only some files are real, for patching them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

from tests.fresh_python import run_fresh

PROBES = Path(__file__).with_name("probes")


def touched_files(diff: Path) -> list[PurePosixPath]:
    """Return the files that a unified diff changes, relative to site-packages."""
    lines = diff.read_text(encoding="utf-8").splitlines()
    return [
        PurePosixPath(line.removeprefix("+++ b/").split("\t")[0])
        for line in lines
        if line.startswith("+++ b/")
    ]


def make_overlay(package: Path, files: list[PurePosixPath], destination: Path) -> Path:
    """Lay out a `vllm` that links to a release, with real copies of `files`.

    Args:
        package: The release's `vllm` folder; nothing in it is changed.
        files: Files to copy, relative to the folder that holds `vllm`.
        destination: An empty folder.

    Returns:
        `destination`, to be put on the path.
    """
    _mirror(package, destination / "vllm", PurePosixPath("vllm"), set(files))
    return destination


def _mirror(
    source: Path, target: Path, place: PurePosixPath, files: set[PurePosixPath]
) -> None:
    target.mkdir(parents=True)
    for child in source.iterdir():
        path = place / child.name
        if path in files:
            (target / child.name).write_bytes(child.read_bytes())
        elif any(path in file.parents for file in files):
            _mirror(child, target / child.name, path, files)
        # a shared cache of bytecode would take what is compiled from the copies
        elif child.name != "__pycache__":
            (target / child.name).symlink_to(child.resolve())


def apply_patch(diff: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Apply a diff as `patches/README.md` says, without fuzz."""
    return subprocess.run(
        ["patch", "-p1", "--fuzz=0", "--forward", "--batch", "-i", str(diff)],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


def run_probe(name: str, overlay: Path, argument: Any = None) -> Any:
    """Run a script of `probes/` against the overlay's vLLM, with no plugin loaded.

    Args:
        name: The script. It prints its result as JSON in its last line.
        overlay: What `make_overlay` returned.
        argument: Handed to the script as JSON.

    Returns:
        The script's result.
    """
    environment = os.environ | {
        "PYTHONPATH": str(overlay),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VLLM_PLUGINS": "none",
        "OMP_NUM_THREADS": "1",
    }
    process = run_fresh(
        (PROBES / name).read_text(encoding="utf-8"),
        json.dumps(argument),
        environment=environment,
        folder=overlay,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])
