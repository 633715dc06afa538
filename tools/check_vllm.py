# SPDX-License-Identifier: Apache-2.0
"""Check a release of vLLM for every hook of the plugin, without installing it.

    python -m tools.check_vllm vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl

Reads the wheel's Python source and resolves imports and inheritance in it; nothing is
imported or run, so any release can be checked on any machine. Prints a Markdown table
with one column a release and exits with 1 if any hook is gone or has changed.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from pathlib import Path

from tabulate import tabulate

from tools.vllm_source import SourceRelease
from vllm_roco.hook_check import complaints
from vllm_roco.hooks import HOOKS


def open_release(path: Path) -> Traversable:
    """Return the `vllm` package within a wheel or a folder.

    Args:
        path: A wheel, the `vllm` folder, or a folder that holds it.

    Raises:
        ValueError: There is no vLLM at that path.
    """
    if path.is_dir():
        root: Traversable = path
    elif path.is_file() and zipfile.is_zipfile(path):
        root = zipfile.Path(path)
    else:
        raise ValueError(
            f"{path} is neither a wheel nor a folder. Give a vLLM wheel "
            "(`pip download --no-deps vllm==<version>`) or an unpacked one."
        )
    for package in (root / "vllm", root):
        if (package / "v1").is_dir() and (package / "_version.py").is_file():
            return package
    raise ValueError(
        f"{path} holds no vllm package with Python source. Give a wheel, not a source "
        "distribution or a git checkout."
    )


def check(releases: Sequence[SourceRelease]) -> tuple[str, list[str]]:
    """Check every hook against every release.

    Returns:
        The table, and a sentence for each failure.
    """
    rows, failures = [], []
    for hook in HOOKS:
        row = [f"`{hook.label.removeprefix('vllm.')}`", hook.why]
        for release in releases:
            found = list(complaints(hook, release))
            row.append("FAIL" if found else "PASS")
            failures += [f"{release.version}: {sentence}" for sentence in found]
        rows.append(row)
    headers = ["hook", "needed to", *(release.version for release in releases)]
    return tabulate(rows, headers, tablefmt="github"), failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the failures; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_vllm",
        description="Check releases of vLLM for the hooks that vllm_roco needs.",
    )
    parser.add_argument(
        "release", nargs="+", type=Path, help="a vLLM wheel, or a folder with vllm/"
    )
    paths = parser.parse_args(arguments).release
    try:
        releases = [SourceRelease(open_release(path)) for path in paths]
    except ValueError as error:
        parser.error(str(error))
    table, failures = check(releases)
    print(table)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
