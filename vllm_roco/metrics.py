# SPDX-License-Identifier: Apache-2.0
"""What the budget did, counted in the engine core and read by the front end.

vLLM gives a plugin no field in the statistics that travel from the engine core to the
front end, so each engine core keeps its numbers in a small memory-mapped file that the
front end reads whenever somebody asks. Publishing costs the scheduler three stores.

A file belongs to one engine core, which holds an exclusive `flock` on it. The kernel
drops that lock when the owner dies, however it dies: a file that can be locked is a
leftover, never read, and swept when the next engine starts.

    byte 0         8         16        24 ................ end
         | freed   | max     | peak    | JSON: who publishes |

The numbers are native unsigned 64-bit integers, each written and read with one aligned
load or store, so a reader never sees half a value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import mmap
import multiprocessing
import os
import stat
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

_NUM_VALUES = 3
_HEADER_BYTES = 8 * _NUM_VALUES

# names the layout above: another release of this package may share the directory
_SUFFIX = ".metrics1"


@dataclass(frozen=True, kw_only=True)
class EngineMetrics:
    """The numbers of one engine core since it started.

    Attributes:
        engine: Data-parallel index of the engine core, 0 without data parallelism.
        model_name: Served name of the model, as in vLLM's own metrics.
        budget_tokens: The option `budget`.
        freed_blocks: Blocks given back to vLLM's block manager by the budget. Blocks
            of finished or preempted requests do not count.
        max_sequence_kv_tokens: Most KV tokens that one running sequence holds now,
            in whole blocks.
        peak_sequence_kv_tokens: Most KV tokens that one sequence ever held.
    """

    engine: int
    model_name: str
    budget_tokens: int
    freed_blocks: int
    max_sequence_kv_tokens: int
    peak_sequence_kv_tokens: int


@dataclass(frozen=True, kw_only=True)
class RocoMetrics:
    """The numbers of every engine core that serves one model.

    Attributes:
        engines: One entry per engine core, by engine index; never empty.
    """

    engines: tuple[EngineMetrics, ...]

    @property
    def budget_tokens(self) -> int:
        """The option `budget`, the same in every engine."""
        return self.engines[0].budget_tokens

    @property
    def freed_blocks(self) -> int:
        """Blocks given back by the budget, summed over the engines."""
        return sum(engine.freed_blocks for engine in self.engines)

    @property
    def max_sequence_kv_tokens(self) -> int:
        """Most KV tokens that one running sequence of any engine holds now."""
        return max(engine.max_sequence_kv_tokens for engine in self.engines)

    @property
    def peak_sequence_kv_tokens(self) -> int:
        """Most KV tokens that one sequence of any engine ever held."""
        return max(engine.peak_sequence_kv_tokens for engine in self.engines)


class MetricsPublisher:
    """The engine core's side: owns one file and writes its numbers.

    Not thread-safe: one thread, the scheduler's, publishes.

    Args:
        instance_id: `VllmConfig.instance_id`, which the front end's copy of the
            configuration shares.
        engine: Data-parallel index of this engine core.
        model_name: Served name of the model.
        budget_tokens: The option `budget`.

    Raises:
        PermissionError: The directory of the files is not this user's alone.
        OSError: The file cannot be written.
    """

    def __init__(
        self, *, instance_id: str, engine: int, model_name: str, budget_tokens: int
    ) -> None:
        identity = _Identity(
            instance_id=instance_id,
            frontend_pid=_frontend_pid(),
            engine=engine,
            model_name=model_name,
            budget_tokens=budget_tokens,
        )
        path, descriptor, mapping = _create_file(identity)
        self._values = memoryview(mapping)[:_HEADER_BYTES].cast("Q")
        self._peak = 0
        self._finalizer = weakref.finalize(
            self, _remove_file, path, descriptor, os.getpid()
        )

    def publish(self, freed_blocks: int, max_sequence_kv_tokens: int) -> None:
        """Show new numbers; call it whenever the scheduler changed them.

        Args:
            freed_blocks: Blocks given back by the budget since the engine started.
            max_sequence_kv_tokens: Most KV tokens one running sequence holds now:
                blocks held times block size, 0 when nothing runs.
        """
        values = self._values
        values[0] = freed_blocks
        values[1] = max_sequence_kv_tokens
        if max_sequence_kv_tokens > self._peak:
            self._peak = values[2] = max_sequence_kv_tokens

    def close(self) -> None:
        """Remove the file. Closing twice is harmless."""
        self._finalizer()


def get_metrics(llm: LLM | LLMEngine | AsyncLLM) -> RocoMetrics:
    """Return what the budget did so far in the engines of `llm`.

    Works with the engine core in this process and in processes of its own, with and
    without `disable_log_stats`.

    Args:
        llm: An `LLM`, or the `LLMEngine` or `AsyncLLM` itself, in the process that
            created it.

    Raises:
        RuntimeError: No engine of `llm` publishes: another attention backend is in
            use, or the engine has been shut down.
    """
    engine: Any = getattr(llm, "llm_engine", llm)
    instance_id = engine.vllm_config.instance_id
    engines = read_engines(instance_id)
    if not engines:
        backend = engine.vllm_config.attention_config.backend
        raise RuntimeError(
            f"roco: no running engine of vLLM instance {instance_id} publishes "
            f"metrics. Its attention backend is {getattr(backend, 'name', backend)}; "
            "the metrics exist while an engine with attention_backend='ROCO' runs "
            "that was started from this process."
        )
    return RocoMetrics(engines=engines)


def read_engines(instance_id: str | None = None) -> tuple[EngineMetrics, ...]:
    """Return the numbers of the live engine cores that this process started.

    Args:
        instance_id: Only the engines of this vLLM instance; None for all of them.

    Returns:
        One entry per engine core, by engine index.
    """
    engines = [
        EngineMetrics(
            engine=identity.engine,
            model_name=identity.model_name,
            budget_tokens=identity.budget_tokens,
            freed_blocks=freed_blocks,
            max_sequence_kv_tokens=max_tokens,
            peak_sequence_kv_tokens=peak_tokens,
        )
        for identity, (freed_blocks, max_tokens, peak_tokens) in _read_files()
        if identity.frontend_pid == os.getpid()
        and instance_id in (None, identity.instance_id)
    ]
    return tuple(sorted(engines, key=lambda metrics: metrics.engine))


@dataclass(frozen=True, kw_only=True)
class _Identity:
    instance_id: str
    frontend_pid: int
    engine: int
    model_name: str
    budget_tokens: int


def _frontend_pid() -> int:
    # an engine core is a child of the front end, or the front end itself
    parent = multiprocessing.parent_process()
    pid = os.getpid() if parent is None else parent.pid
    assert pid is not None
    return pid


def _directory() -> Path:
    return Path(tempfile.gettempdir()) / f"vllm_roco-{os.geteuid()}"


def _is_private(directory: Path) -> bool:
    # lstat: a symbolic link may be another user's
    status = directory.lstat()
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & 0o077
    )


def _create_file(identity: _Identity) -> tuple[Path, int, mmap.mmap]:
    """Create this engine's file, locked, and sweep what dead engines left."""
    directory = _directory()
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    if not _is_private(directory):
        raise PermissionError(
            f"roco: {directory} must be a directory that belongs to user "
            f"{os.geteuid()} with mode 0700, to hold the metrics of running engines. "
            "Remove it, or set TMPDIR to a directory of your own."
        )
    content = bytes(_HEADER_BYTES) + json.dumps(dataclasses.asdict(identity)).encode()
    with _locked(directory):
        _sweep(directory)
        descriptor, name = tempfile.mkstemp(
            dir=directory, prefix=f"{os.getpid()}-{identity.engine}-"
        )
        os.write(descriptor, content)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # only now may readers find it
        path = Path(name).with_suffix(_SUFFIX)
        os.rename(name, path)
    return path, descriptor, mmap.mmap(descriptor, len(content))


def _remove_file(path: Path, descriptor: int, owner_pid: int) -> None:
    # a forked child inherits the publisher, but not the file
    if os.getpid() == owner_pid:
        path.unlink(missing_ok=True)
    os.close(descriptor)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other engines from sweeping a file that is not locked yet."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(directory: Path) -> None:
    for path in directory.iterdir():
        descriptor = _open(path)
        if descriptor is None:
            continue
        if not _is_alive(descriptor):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _open(path: Path) -> int | None:
    # the owner may remove its file at any time
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None


def _is_alive(descriptor: int) -> bool:
    # shared, so that two readers do not take each other for the owner
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _read_files() -> Iterator[tuple[_Identity, tuple[int, ...]]]:
    directory = _directory()
    try:
        if not _is_private(directory):
            return
    except FileNotFoundError:
        return
    for path in directory.glob(f"*{_SUFFIX}"):
        descriptor = _open(path)
        if descriptor is None:
            continue
        try:
            if _is_alive(descriptor):
                yield _read_file(descriptor)
        finally:
            os.close(descriptor)


def _read_file(descriptor: int) -> tuple[_Identity, tuple[int, ...]]:
    mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    identity = _Identity(**json.loads(mapping[_HEADER_BYTES:]))
    return identity, tuple(memoryview(mapping)[:_HEADER_BYTES].cast("Q"))
