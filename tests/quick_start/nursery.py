# SPDX-License-Identifier: Apache-2.0
"""Python processes that have the libraries of vLLM when they begin.

Importing vLLM takes some 8 s of a core, three quarters of them for libraries that know
nothing of it, and each process of an engine does it anew. A nursery is a process that
has imported these libraries and nothing else, and forks for another one, its owner.

What it forks is a child of the owner, so that waiting, signals and trees of processes
are as ever. Multiprocessing's `spawn` is served, too, as spawning is meant: of the
owner's memory, modules and open files only what it passes on is there.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any

LIBRARIES = [
    "cv2",
    "fastapi",
    "openai.types.responses",
    "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "opentelemetry.sdk.trace",
    "requests",
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

UNCOMPILED = "TORCH_COMPILE_DISABLE"
"""PyTorch's environment variable that lets it compile nothing."""

_SPAWNED = "--multiprocessing-fork"
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_MOST_FILES = 200


class Nursery:
    """The owner's side.

    Args:
        connection: To a process in which `_rear` runs, a child of this one.
        process: That one, if it was executed.
    """

    def __init__(
        self, connection: socket.socket, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._connection = connection
        self._process = process
        self._turn = threading.Lock()

    def start(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        files: Mapping[int, int] | None = None,
    ) -> int:
        """Start a Python process.

        Args:
            arguments: Of the interpreter: `-c` and code, `-m` and a module's name, or a
                script, and more behind it; before it `-P`, or no option.
            environment: All variables; `PYTHONPATH` goes before other places. None for
                those of the caller. What a library reads while it is imported (`OMP_*`,
                `HF_*`), and Python when it starts (`PYTHONHASHSEED`), it has read then.
            folder: The current folder; None for that of the caller.
            files: What each file descriptor of the process is here. The first three are
                those of the caller where they are not named.

        Returns:
            The process id of a child of this process.

        Raises:
            OSError: The nursery is gone.
        """
        files = {number: number for number in range(3)} | dict(files or {})
        asked = {
            "arguments": list(arguments),
            "environment": dict(os.environ if environment is None else environment),
            "folder": str(folder or Path.cwd()),
            "files": list(files),
        }
        message = json.dumps(asked).encode()
        with self._turn, _adopting():
            head = len(message).to_bytes(8, "big")
            socket.send_fds(self._connection, [head], list(files.values()))
            self._connection.sendall(message)
            pid = int.from_bytes(_read(self._connection, 8), "big")
            # once more when it is a child of this process
            _read(self._connection, 1)
        return pid


EXECUTED = "ROCO_EXECUTED"
"""Environment variable that lets each process be executed, none forked."""


def is_possible() -> bool:
    """Tell whether forks are sound here: what CUDA has begun does not survive one."""
    return (
        sys.platform == "linux"
        and EXECUTED not in os.environ
        and not Path("/dev/nvidiactl").exists()
    )


def opened(libraries: Sequence[str] = LIBRARIES) -> Nursery:
    """Return a nursery in a process of its own, which imports in its own time."""
    here, there = socket.socketpair()
    with there:
        process = subprocess.Popen(
            [sys.executable, __file__, str(there.fileno()), *libraries],
            pass_fds=[there.fileno()],
            # what it starts has files of its own
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    return Nursery(here, process)


def branch_off() -> Nursery:
    """Return a nursery that is a fork of this process, which has only libraries."""
    here, there = socket.socketpair()
    owner = os.getpid()
    if os.fork():
        there.close()
        return Nursery(here)
    here.close()
    # whatever happens, the copy does not go on with what its owner does
    with _ending():
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == owner:
            _rear(there)
    raise AssertionError("nothing comes back")


def import_libraries(libraries: Sequence[str] = LIBRARIES) -> None:
    """Import libraries, as far as they are there."""
    collects = gc.isenabled()
    gc.disable()
    for name in libraries:
        # another release of theirs may have moved one
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    # where a title goes is found by the variables, and forks will have others
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("setproctitle").getproctitle()
    if collects:
        gc.enable()


def collect_by_itself() -> None:
    """Let this process look for garbage when there is some, not when vLLM asks for it.

    It asks while it loads a model, before it serves and at the end, then through all
    libraries, too: a fifth of what a worker with a tiny model does.
    """
    gc.collect = lambda *_: 0
    gc.unfreeze = lambda: None


def serve_spawn(open_nursery: Any) -> None:
    """Let multiprocessing's `spawn` start its processes from a nursery.

    Args:
        open_nursery: Returns the nursery of this process.
    """
    by_execution = util.spawnv_passfds

    def spawn(path: bytes, arguments: Sequence[str | bytes], files: Any) -> int:
        decoded = [os.fsdecode(argument) for argument in arguments]
        if _SPAWNED in decoded and is_possible():
            # killed, as by a signal to the whole group, it leaves this to the original
            with contextlib.suppress(OSError):
                numbers = {number: number for number in map(int, files)}
                start = decoded.index("-c")
                return open_nursery().start(decoded[start:], files=numbers)
        return by_execution(path, arguments, files)

    util.spawnv_passfds = spawn


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Be the parent of processes whose own parent ends, and is below this one."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(_SET_CHILD_SUBREAPER, 0)


def _read(connection: socket.socket, size: int) -> bytes:
    read = b""
    while len(read) < size:
        part = connection.recv(size - len(read))
        if not part:
            raise BrokenPipeError("a nursery is gone")
        read += part
    return read


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """End the process with the block, and tell why if that raises."""
    status = 1
    try:
        yield
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _rear(connection: socket.socket) -> None:
    """Fork as the owner asks, until it is gone."""
    # what goes wrong here is told where the owner complains
    complaints = os.dup(2)
    sys.stderr = os.fdopen(complaints, "w", closefd=False)
    # an interrupt is for the owner and for what it has started
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in (connection.fileno(), complaints):
            with contextlib.suppress(OSError):
                os.close(int(name))
    # a look for garbage would copy every page of what the forks share
    gc.freeze()
    while True:
        head, files, *_ = socket.recv_fds(connection, 8, _MOST_FILES)
        if not head:
            return
        asked = json.loads(_read(connection, int.from_bytes(head, "big")))
        between = os.fork()
        if not between:
            first_parent = os.getpid()
            child = os.fork()
            if not child:
                with _ending():
                    connection.close()
                    while os.getppid() == first_parent:
                        time.sleep(1e-4)
                    os.close(complaints)
                    _become(asked, files)
            connection.sendall(child.to_bytes(8, "big"))
            # the child's next parent is the owner
            os._exit(0)
        os.waitpid(between, 0)
        connection.sendall(b".")
        for file in files:
            os.close(file)


def _become(asked: dict[str, Any], files: list[int]) -> None:
    """Be the process that was asked for; never return."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = sys.__stderr__
    numbers: list[int] = asked["files"]
    above = max([*numbers, *files]) + 1
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip(numbers, moved, strict=True):
        os.dup2(file, number)
        os.close(file)
    # while there is nothing here but libraries
    own = branch_off()
    serve_spawn(lambda: own)
    if {_SPAWNED, "vllm.entrypoints.cli.main"} & {*asked["arguments"]}:
        collect_by_itself()
    environment: dict[str, str] = asked["environment"]
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(environment)
    if environment.get(UNCOMPILED) == "1" and "torch._dynamo.config" in sys.modules:
        # which it has read
        sys.modules["torch._dynamo.config"].disable = True
    # found out anew, by the variables
    tempfile.tempdir = None
    if "numpy" in sys.modules:
        # two processes draw different numbers, as if each had been executed
        sys.modules["numpy"].random.seed()
    importlib.invalidate_caches()
    path = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    assert not {"vllm", "vllm_roco"} & sys.modules.keys()
    status = _run(asked["arguments"], [entry for entry in path if entry])
    with contextlib.suppress(Exception):
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status & 0xFF)


def _run(arguments: list[str], path: list[str]) -> int:
    """Run a program and return its exit status."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    is_safe = arguments[0] == "-P"
    arguments = arguments[is_safe:]
    sys.argv = list(arguments)
    places = {"-c": "", "-m": os.getcwd()}
    place = places.get(arguments[0], str(Path(arguments[0]).parent))
    sys.path[:0] = path if is_safe else [place, *path]
    try:
        if arguments[0] == "-c":
            del sys.argv[1]
            exec(compile(arguments[1], "<string>", "exec"), vars(main))
        elif arguments[0] == "-m":
            del sys.argv[0]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            main.__file__ = arguments[0]
            source = Path(arguments[0]).read_bytes()
            exec(compile(source, arguments[0], "exec"), vars(main))
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _main() -> None:
    # this folder is on the path for `sitecustomize` alone
    del sys.path[0]
    import_libraries(sys.argv[2:])
    _rear(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    _main()
