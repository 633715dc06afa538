# SPDX-License-Identifier: Apache-2.0
"""Runs tests on the Python files of a vLLM release that is not installed.

    python -m tests.on_release 0.33.0 tests/test_scheduler.py -x

What follows the release goes to pytest. Only what needs no compiled part of vLLM runs
like this: scheduling, block accounting, configuration. `tools/releases.py` tells where
the files come from.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from tools.releases import need_release

ROOT = Path(__file__).parents[1]


def main(version: str, arguments: list[str]) -> int:
    """Run pytest, in this process, with a release's files in the place of vLLM.

    Args:
        version: A release that `need_release` finds.
        arguments: Of pytest.

    Returns:
        pytest's exit status.

    Raises:
        FileNotFoundError: The release's files are not there.
    """
    release = need_release(version)
    # vLLM keeps what it found out about models, of one release only
    os.environ["VLLM_CACHE_ROOT"] = str(release / "cache")
    with tempfile.TemporaryDirectory() as folder:
        # without the metadata beside it, by which vLLM would take itself for a build
        # for GPUs: those of the installed build say what is compiled here
        Path(folder, "vllm").symlink_to(release / "vllm")
        sys.path.insert(0, folder)
        # vLLM looks at models in a process of its own
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, str(ROOT)])
        # one process, and nothing that another run at the same time would write too
        status = pytest.main(["-p", "no:xdist", "-p", "no:cacheprovider", *arguments])
        ran_on = getattr(sys.modules.get("vllm"), "__version__", version)
    if ran_on != version:
        print(f"these tests ran on vLLM {ran_on}, not on {version}")
        return status or pytest.ExitCode.INTERNAL_ERROR
    return status


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.on_release RELEASE [ARGUMENT OF PYTEST]...")
    try:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
    except FileNotFoundError as error:
        sys.exit(str(error))
