# SPDX-License-Identifier: Apache-2.0
"""Pythons in which nothing of vLLM has happened yet, and little is left to import.

Importing vLLM takes some 8 s of a core, most of them for libraries that know nothing of
it. Here they are imported once, by a process of which each of these Pythons is a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIBRARIES = [
    "openai.types.responses",
    "scipy.signal",
    "torch._inductor.lowering",
    "torch._inductor.standalone_compile",
    "torch.distributed.fsdp",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.models.auto.image_processing_auto",
    "triton",
    "xgrammar",
]
"""What vLLM imports of others, as far as that takes long."""

TIME_LIMIT = 300
"""Seconds."""


def run_fresh(
    code: str,
    *arguments: str,
    environment: Mapping[str, str] = os.environ,
    folder: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c` does.

    Args:
        code: The code.
        arguments: What `sys.argv` holds behind its first entry.
        environment: All variables that it sees; `PYTHONPATH` goes before other places.
        folder: The current folder; None for that of the caller.

    Returns:
        Its exit status and what it wrote.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as written:
        files = [Path(written, name) for name in ("stdout", "stderr")]
        asked = {
            "code": code,
            "arguments": arguments,
            "environment": dict(environment),
            "folder": str(folder or Path.cwd()),
            "files": [str(file) for file in files],
        }
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        output, errors = (file.read_text(encoding="utf-8") for file in files)
    return subprocess.CompletedProcess(arguments, status, output, errors)


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", __name__],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    # the end of its input is its own
    atexit.register(server.communicate)
    return server


def _wait_for_code() -> dict[str, Any] | None:
    """Return what is to be run, in a fork; None in the server, at the end."""
    for name in LIBRARIES:
        # another release of theirs may have moved one
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    # whatever else is printed is no answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            asked: dict[str, Any] = json.loads(line)
            return asked
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    return None


def _become(
    code: str,
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    files: list[str],
) -> None:
    signal.alarm(TIME_LIMIT)
    for number, name in enumerate([os.devnull, *files]):
        opened = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # found out anew, by the variables
    tempfile.tempdir = None
    path = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = ["", *filter(None, path)]
    sys.argv = ["-c", *arguments]
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    assert not {"vllm", "vllm_roco"} & sys.modules.keys()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    if (asked := _wait_for_code()) is not None:
        _become(**asked)
