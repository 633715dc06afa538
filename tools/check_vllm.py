# SPDX-License-Identifier: Apache-2.0
"""Check releases of vLLM for everything that the plugin needs, without installing them.

    python -m tools.check_vllm vllm-0.34.0-cp38-abi3-manylinux_2_28_x86_64.whl
    python -m tools.check_vllm        # the tested releases that are not installed

mypy checks the plugin against the release's Python files, and `vllm_roco.hooks` looks
at them from a process that has them first on its path. What they find is printed; the
exit status is 1 if that is anything.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tools.releases import need_release, other_releases, unpack

ROOT = Path(__file__).parents[1]

# vLLM's files are all that matters here, and all that need be there; types that are
# not known are nothing to complain of, nor is what could now be left out
_LOOSE = (
    "--no-site-packages",
    "--ignore-missing-imports",
    "--allow-subclassing-any",
    "--allow-untyped-decorators",
    "--no-warn-return-any",
    "--no-warn-unused-ignores",
    "--no-warn-redundant-casts",
)
_LIST_HOOKS = "import sys; from vllm_roco.hooks import main; sys.exit(main())"


@contextmanager
def open_release(path: Path) -> Iterator[Path]:
    """Give a folder with nothing but the release's `vllm` in it.

    Args:
        path: A wheel, the `vllm` folder, or a folder that holds it.

    Raises:
        ValueError: There is no vLLM at that path.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-release-") as made:
        folder = Path(made)
        if zipfile.is_zipfile(path):
            unpack(path, folder)
        elif path.is_dir():
            package = path if path.name == "vllm" else path / "vllm"
            (folder / "vllm").symlink_to(package.resolve())
        if not (folder / "vllm" / "__init__.py").is_file():
            raise ValueError(
                f"{path} is neither a vLLM wheel nor a folder with the package `vllm`. "
                "Give one of both, for example what `pip download --no-deps "
                "vllm==<version>` gets."
            )
        yield folder


def check(release: Path, root: Path = ROOT) -> list[str]:
    """Return what is amiss with a release.

    Args:
        release: A folder from `open_release`.
        root: The folder with the plugin and its `pyproject.toml`.
    """
    return [*type_errors(release, root), *missing_hooks(release, root)]


def type_errors(release: Path, root: Path = ROOT) -> list[str]:
    """Return what mypy says of the plugin on a release."""
    with tempfile.TemporaryDirectory(prefix="mypy-") as made:
        # without their base class, mypy takes requests to have any attribute
        spec = importlib.util.find_spec("msgspec")
        if spec is not None and spec.origin is not None:
            (Path(made) / "msgspec").symlink_to(Path(spec.origin).parent)
        return _complaints(
            "mypy",
            root,
            ["-m", "mypy", "--package=vllm_roco", f"--cache-dir={os.devnull}", *_LOOSE],
            ": error: ",
            MYPYPATH=os.pathsep.join([str(release), made]),
        )


def missing_hooks(release: Path, root: Path = ROOT) -> list[str]:
    """Return what `vllm_roco.hooks` says of a release."""
    return _complaints(
        "vllm_roco.hooks",
        root,
        ["-c", _LIST_HOOKS],
        ", but ",
        PYTHONPATH=os.pathsep.join([str(release), str(root)]),
        # a platform or plugin that is installed would be tried on the release
        VLLM_PLUGINS="none",
    )


def _complaints(
    name: str, root: Path, arguments: list[str], mark: str, **environment: str
) -> list[str]:
    """Run Python in a folder; return the lines with a mark, or that it has failed."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in result.stdout.splitlines() if mark in line]
    if result.returncode and not found:
        return [f"{name} failed: {result.stdout}{result.stderr}"]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is amiss with each release; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_vllm",
        description="Check releases of vLLM for everything that vllm_roco needs.",
    )
    parser.add_argument(
        "release", nargs="*", type=Path, help="a vLLM wheel, or a folder with vllm/"
    )
    paths = parser.parse_args(arguments).release
    failed = False
    try:
        for path in paths or map(need_release, other_releases()):
            with open_release(path) as release:
                complaints = check(release)
            print(f"{path}: {len(complaints) or 'no'} complaints")
            print(*complaints, sep="\n", end="\n" if complaints else "")
            failed |= bool(complaints)
    except ValueError as error:
        parser.error(str(error))
    except FileNotFoundError as error:
        print(f"not checked: {error}", file=sys.stderr)
        # only in CI every release has to be there
        failed |= bool(os.environ.get("CI"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
