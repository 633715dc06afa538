# SPDX-License-Identifier: Apache-2.0
"""The backend can be chosen by name everywhere, and is idle where it is not."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest
from vllm import LLM, SamplingParams
from vllm.config import get_layers_from_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.benchmark import main as bench_command
from vllm.entrypoints.cli.serve import cmd_init as serve_commands
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.sched.scheduler import Scheduler

import vllm_roco
from tests.engine.engines import engines_in_process
from tests.fresh_python import run_fresh
from tests.model_configs import save_config
from vllm_roco import cpu_platform
from vllm_roco.cpu_platform import RocoCpuPlatform
from vllm_roco.kv_cache.manager import RocoManager
from vllm_roco.metrics import get_metrics

OPTIONS = {"budget": 256, "stride": 128, "chunk": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("llama"), "llama", "LlamaForCausalLM")


def arguments(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 2048,
        "enforce_eager": True,
    } | changes


@pytest.mark.parametrize("name", ["roco", "ROCO"])
def test_engine_arguments_take_the_name(model: Path, name: str) -> None:
    config = EngineArgs(
        **arguments(model, attention_backend=name)
    ).create_engine_config()
    assert config.attention_config.backend is AttentionBackendEnum["ROCO"]


COMMANDS = {
    "serve": ["serve"],
    "bench-latency": ["bench", "latency", "--model"],
    "bench-throughput": ["bench", "throughput", "--model"],
    "bench-startup": ["bench", "startup", "--model"],
}


def parse(
    command: list[str], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> Namespace:
    """Parse a command line as `vllm` does."""
    # the parser of `bench` is only complete where the command line says so
    monkeypatch.setattr(sys, "argv", ["vllm", *command, *options])
    parser = FlexibleArgumentParser()
    subparsers = parser.add_subparsers(dest="subparser")
    for added in [*serve_commands(), *bench_command.cmd_init()]:
        added.subparser_init(subparsers)
    return parser.parse_args(sys.argv[1:])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "options",
    [
        ["--additional-config", '{"roco": {"budget": 512, "shield_ratio": 0.5}}'],
        [
            *("--additional-config.roco.budget", "512"),
            *("--additional-config.roco.shield_ratio", "0.5"),
        ],
    ],
    ids=["json", "dotted"],
)
def test_command_lines_take_the_name_and_the_options(
    model: Path, command: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["--attention-backend", "roco"]
    parsed = parse([*COMMANDS[command], str(model)], chosen + options, monkeypatch)
    # `serve` moves it there before it starts
    parsed.model = str(model)
    config = EngineArgs.from_cli_args(parsed).create_engine_config()
    assert config.attention_config.backend is AttentionBackendEnum["ROCO"]
    assert config.additional_config == {"roco": {"budget": 512, "shield_ratio": 0.5}}


def test_names_reach_a_spawned_process_and_come_back(model: Path) -> None:
    """A spawned process unpickles its configuration before it loads plugins."""
    changes = {
        "attention_backend": "roco",
        "attention_config": {"backend_per_kind": {"sliding_window": "CPU_ATTN"}},
    }
    config = EngineArgs(**arguments(model, **changes)).create_engine_config()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        returned = pool.submit(operator.attrgetter("attention_config"), config).result()
    assert returned.backend is AttentionBackendEnum["ROCO"]
    assert returned.backend_per_kind == {
        "sliding_window": AttentionBackendEnum.CPU_ATTN
    }


def test_registering_again_changes_nothing() -> None:
    vllm_roco.register()
    before = list(AttentionBackendEnum.__members__)
    member = AttentionBackendEnum["ROCO"]
    vllm_roco.register()
    assert list(AttentionBackendEnum.__members__) == before
    assert AttentionBackendEnum["ROCO"] is member


def run_python(code: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run code in a Python of its own; return its status and all that it wrote."""
    done = run_fresh(code, *arguments, environment=os.environ | environment)
    return done.returncode, done.stderr + done.stdout


@pytest.mark.parametrize("module", ["vllm_roco", "vllm_roco.platform"])
def test_entry_points_import_nothing_heavy(module: str) -> None:
    """They are imported by every command of vLLM, `--help` included."""
    code = f"""
import sys
import {module}
print([name for name in ("torch", "vllm", "numpy") if name in sys.modules])
"""
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed == "[]\n"


def test_a_configuration_of_ones_own_needs_the_plugins_first() -> None:
    """As docs/troubleshooting.md says."""
    code = """
from vllm.config import AttentionConfig
from vllm.plugins import load_general_plugins

try:
    AttentionConfig(backend="roco")
except ValueError as error:
    print(error)
load_general_plugins()
print(AttentionConfig(backend="roco").backend.name)
"""
    status, written = run_python(code)
    assert status == 0
    assert "Unknown attention backend: 'ROCO'" in written
    assert written.endswith("ROCO\n")


CHOOSE = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

def choose(backend):
    arguments = dict(load_format="dummy", skip_tokenizer_init=True)
    args = EngineArgs(sys.argv[1], attention_backend=backend, **arguments)
    print(type(current_platform).__name__, args.create_engine_config().cache_config)

choose("CPU_ATTN")
try:
    choose("roco")
except ValueError as error:
    print(error)
"""
"""Chooses the stock backend, then ROCO."""


def test_a_platform_that_vllm_is_told_to_use_is_not_silent(model: Path) -> None:
    """With this variable vLLM takes its own CPU platform, which ignores the choice."""
    status, written = run_python(CHOOSE, str(model), VLLM_TARGET_DEVICE="cpu")
    assert status == 0, written
    assert "\nCpuPlatform" in written
    assert "Unset VLLM_TARGET_DEVICE" in written
    assert "Unknown attention backend: 'ROCO'" in written


@pytest.fixture
def install_platform(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Return a function that installs another platform plugin.

    It takes the platform's base class and returns environment variables.
    """

    def install(base: str) -> dict[str, str]:
        module, _, name = base.rpartition(".")
        (tmp_path / "other_platform.py").write_text(
            f"from {module} import {name}\n"
            f"class OtherPlatform({name}):\n"
            "    pass\n"
            "def activate():\n"
            "    return 'other_platform.OtherPlatform'\n"
        )
        metadata = tmp_path / "other_platform-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: other-platform\nVersion: 1.0\n"
        )
        (metadata / "entry_points.txt").write_text(
            "[vllm.platform_plugins]\nother = other_platform:activate\n"
        )
        path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(path)}

    return install


def test_steps_aside_for_another_platform(
    model: Path, install_platform: Callable[[str], dict[str, str]]
) -> None:
    """Two of them would keep vLLM from starting, whatever backend is chosen."""
    environment = install_platform("vllm.platforms.cpu.CpuPlatform")
    status, written = run_python(CHOOSE, str(model), **environment)
    assert status == 0, written
    assert "\nOtherPlatform" in written
    assert "VLLM_PLUGINS=roco" in written
    assert "Unknown attention backend: 'ROCO'" in written

    status, written = run_python(CHOOSE, str(model), VLLM_PLUGINS="roco", **environment)
    assert status == 0, written
    assert written.count("\nRocoCpuPlatform") == 2


def test_a_platform_derived_from_ours_can_be_chosen(
    model: Path, install_platform: Callable[[str], dict[str, str]]
) -> None:
    environment = install_platform("vllm_roco.cpu_platform.RocoCpuPlatform")
    status, written = run_python(CHOOSE, str(model), **environment)
    assert status == 0, written
    assert written.count("\nOtherPlatform") == 2


@pytest.mark.parametrize("block_size", [None, 16, 32, 64, 128])
def test_prefers_blocks_of_16_tokens(model: Path, block_size: int | None) -> None:
    changes = {
        "attention_backend": "roco",
        "block_size": block_size,
        "additional_config": {"roco": OPTIONS},
    }
    config = EngineArgs(**arguments(model, **changes)).create_engine_config()
    assert config.cache_config.block_size == (block_size or 16)


def test_says_when_options_have_no_effect(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who forgets the backend's name would get a full cache and never know."""
    # not by the log: a process prints it once, perhaps in an earlier test
    said: list[str] = []
    monkeypatch.setattr(cpu_platform.logger, "warning_once", said.append)
    changes = {"additional_config": {"roco": OPTIONS}}
    EngineArgs(**arguments(model, **changes)).create_engine_config()
    assert any("Add --attention-backend roco" in line for line in said)


@pytest.fixture
def start(model: Path) -> Iterator[Callable[..., LLM]]:
    """A function that starts an engine in this process."""
    started: list[LLM] = []

    def start(**changes: Any) -> LLM:
        changes = {"num_gpu_blocks_override": 64} | changes
        started.append(LLM(**arguments(model, **changes)))
        return started[-1]

    with engines_in_process():
        yield start
        while started:
            started.pop().llm_engine.engine_core.shutdown()


def generate(llm: LLM, num_prompt_tokens: int, num_new_tokens: int) -> None:
    sampling = SamplingParams(
        temperature=0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False
    )
    prompt = {"prompt_token_ids": [7] * num_prompt_tokens}
    (request,) = llm.generate([prompt], sampling, use_tqdm=False)
    assert len(request.outputs[0].token_ids) == num_new_tokens


@pytest.mark.engine
@pytest.mark.parametrize("block_size", [64, 128])
def test_larger_blocks_are_evicted(start: Callable[..., LLM], block_size: int) -> None:
    llm = start(
        attention_backend="roco",
        block_size=block_size,
        additional_config={"roco": OPTIONS},
    )
    generate(llm, num_prompt_tokens=400, num_new_tokens=100)
    coordinator = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    (manager,) = coordinator.coordinator.single_type_managers
    assert isinstance(manager, RocoManager)
    # at 499 computed tokens one stride has gone
    assert manager.num_freed_blocks == 128 // block_size
    assert manager.block_pool.get_num_free_blocks() == 63


@pytest.mark.engine
def test_is_idle_when_another_backend_is_chosen(
    start: Callable[..., LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    llm = start()
    generate(llm, num_prompt_tokens=100, num_new_tokens=2)

    core = llm.llm_engine.engine_core.engine_core
    layers = get_layers_from_vllm_config(core.vllm_config, Attention)
    assert isinstance(current_platform, RocoCpuPlatform)
    assert {layer.attn_backend.get_name() for layer in layers.values()} == {"CPU_ATTN"}
    assert core.vllm_config.cache_config.block_size == 128
    assert type(core.scheduler) is Scheduler
    assert not list(tmp_path.glob("vllm_roco*"))
    assert b"vllm:roco_" not in generate_latest(REGISTRY)
    with pytest.raises(RuntimeError, match="attention backend is None"):
        get_metrics(llm)
