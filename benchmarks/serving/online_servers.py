# SPDX-License-Identifier: Apache-2.0
"""The servers of a comparison: one after another, or all alive and asked in turns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from subprocess import TimeoutExpired

from tqdm import tqdm

from benchmarks.serving.engines import Engine
from benchmarks.serving.http_server import Server, started
from benchmarks.serving.online_client import warmed_up
from benchmarks.serving.online_shapes import Run
from benchmarks.serving.signals import held_back
from tools.demo.server import STOP_SECONDS


@dataclass
class Servers:
    """The servers of the runs, started when they are first asked.

    Attributes:
        common: What every engine is told.
        tokenizer: Of servers and client.
        together: Engines whose servers start together and live until the block's end;
            all of them must fit into the GPU's memory. Any other ends with the next.
    """

    common: Sequence[str]
    tokenizer: str
    together: Sequence[Engine] = ()
    _alive: dict[Engine, Server] = field(default_factory=dict)
    _warm: set[tuple[Engine, str]] = field(default_factory=set)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def ready(self, run: Run) -> Server:
        """Return a run's server, which has answered such requests before.

        Raises:
            RuntimeError: It does not start, or does not answer.
        """
        engine = run.engine
        alive = self._alive.get(engine)
        if alive is None or alive.process.poll() is not None:
            self._end()
            every = self.together if engine in self.together else [engine]
            for other in every:
                told = other.command([f"--tokenizer={self.tokenizer}", *self.common])
                with held_back():
                    self._alive[other] = self._stack.enter_context(started(told))
            for server in tqdm(self._alive.values(), "servers start", leave=False):
                server.wait_until_ready()
        server = self._alive[engine]
        if (engine, run.name) not in self._warm:
            warmed_up(server.url, run.shape, self.tokenizer)
            self._warm.add((engine, run.name))
        return server

    def _end(self) -> None:
        with held_back():
            # all of them at once; the stack ends what is left, one after another
            servers = [*self._alive.values()]
            for server in servers:
                server.process.terminate()
            for server in servers:
                with suppress(TimeoutExpired):
                    server.process.wait(STOP_SECONDS)
            self._alive.clear()
            self._warm.clear()
            self._stack.close()
