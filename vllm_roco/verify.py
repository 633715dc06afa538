# SPDX-License-Identifier: Apache-2.0
"""Checks an installation on the machine it runs on.

    python -m vllm_roco.verify

Prints a report to paste into an issue; the exit status is 0 if nothing failed. Nothing
is downloaded: the engine check runs a tiny model with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from typing_extensions import override

from vllm_roco.chunking import next_step_ends
from vllm_roco.eviction_schedule import EvictionSchedule

BUDGET, STRIDE, CHUNK = 64, 32, 64
BLOCK_SIZE = 16
NUM_NEW = 100
PROMPTS = (158, 157, 90, 40)
"""Prompt lengths of the engine check, in tokens; the first two end at an eviction."""

_SCHEDULE = EvictionSchedule(block_size=BLOCK_SIZE, budget=BUDGET, stride=STRIDE)

_MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}

_ENVIRONMENT = {
    # the report is what is wanted; vLLM still tells of errors
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


class Skipped(Exception):
    """A check does not apply to this machine; the message says why."""


class Failed(Exception):
    """A check found something; the message says what."""


@dataclass(frozen=True)
class Result:
    """How a check ended.

    Attributes:
        name: Of the check.
        verdict: `"PASS"`, `"FAIL"` or `"SKIP"`.
        details: What was found, in one or more lines.
    """

    name: str
    verdict: str
    details: str

    @override
    def __str__(self) -> str:
        first, *others = self.details.splitlines() or [""]
        lines = [f"[{self.verdict}] {self.name}: {first}"]
        return "\n".join(lines + [f"       {line}" for line in others])


def check_versions() -> str:
    """Return the versions and the device; an untested vLLM is no failure."""
    import torch
    from vllm.platforms import current_platform

    from vllm_roco import compat

    compat.check_version()
    version = compat.installed_version()
    tested = version is not None and version.public in compat.TESTED_VLLM
    device = current_platform.device_name
    if current_platform.is_cuda():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        device = f"{torch.cuda.get_device_name()} (capability {capability})"
    installed = [
        f"{name} {_version_of(name)}"
        for name in ("vllm-roco", "torch", "triton", "transformers", "xformers")
    ]
    return (
        f"vLLM {version} ({'tested' if tested else 'not tested'}), "
        f"{', '.join(installed)}\n"
        f"Python {platform.python_version()} on {platform.platform()}, device {device}"
    )


def check_hooks() -> str:
    """Look for what the plugin imports, calls and overrides of the installed vLLM."""
    from vllm_roco.hooks import hooks

    found = hooks()
    if missing := [str(hook) for hook in found if hook.trouble]:
        raise Failed("\n".join(missing))
    return f"all {len(found)} of this platform are there"


def check_registration() -> str:
    """Load vLLM's plugins as vLLM does, and look for the backend."""
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    member = AttentionBackendEnum.__members__.get("ROCO")
    if member is None:
        raise Failed(
            "vLLM does not know ROCO. Install the package in the environment of vLLM, "
            f"and see that VLLM_PLUGINS ({os.environ.get('VLLM_PLUGINS')!r}) does not "
            "leave `roco` out; vLLM's log tells of whatever else stands in the way."
        )
    backend = member.get_class()
    where = type(current_platform).__qualname__
    return f"{member.name} is {backend.get_impl_cls().__qualname__} on {where}"


def check_kernels() -> str:
    """Run the Triton kernels on the GPU and compare them with PyTorch."""
    import torch

    if not torch.cuda.is_available():
        raise Skipped(
            "no CUDA device, and the CPU implementation has no kernels of its own"
        )
    from vllm_roco.kernel_check import CHECKS

    device = torch.device("cuda")
    failures = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, check in CHECKS.items():
            torch.manual_seed(0)
            try:
                check(device, dtype)
            except AssertionError as error:
                failures.append(f"{name}, {dtype}: {error}")
    if failures:
        raise Failed("\n".join(failures))
    return f"{', '.join(CHECKS)} agree with PyTorch in bfloat16 and float32"


def check_engine() -> str:
    """Generate with a tiny random model beyond its budget, with graphs on a GPU."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.platforms import current_platform

    from vllm_roco.metrics import get_metrics

    if current_platform.is_cuda():
        execution: dict[str, Any] = {
            # without torch.compile, which takes longer than everything else here
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            "kv_cache_memory_bytes": 2**28,
            "gpu_memory_utilization": 0.1,
        }
    else:
        execution = {"enforce_eager": True}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_MODEL))
        trace = Path(folder, "trace.jsonl")
        llm = LLM(
            folder,
            attention_backend="ROCO",
            additional_config={
                "roco": {
                    "budget": BUDGET,
                    "stride": STRIDE,
                    "chunk": CHUNK,
                    "sink": 16,
                    "recent": 16,
                    "trace": str(trace),
                }
            },
            load_format="dummy",
            skip_tokenizer_init=True,
            block_size=BLOCK_SIZE,
            max_model_len=512,
            max_num_seqs=4,
            max_num_batched_tokens=256,
            num_gpu_blocks_override=256,
            **execution,
        )
        outputs = llm.generate(
            [
                # no prefix in common, so that each is read from its first token on
                TokensPrompt(prompt_token_ids=[(i + n) % 256 for n in range(length)])
                for i, length in enumerate(PROMPTS)
            ],
            SamplingParams(
                temperature=0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False
            ),
            use_tqdm=False,
        )
        metrics = get_metrics(llm)
        vllm_config = llm.llm_engine.vllm_config
        steps = [json.loads(line) for line in trace.read_text().splitlines()]
    _check_step_ends(steps)
    bound = _SCHEDULE.max_blocks(vllm_config.max_concurrent_batches * CHUNK)
    if metrics.peak_sequence_kv_tokens > bound * BLOCK_SIZE:
        raise Failed(
            f"a sequence held {metrics.peak_sequence_kv_tokens} tokens of KV cache, "
            f"more than the bound of {bound * BLOCK_SIZE} that vLLM plans with"
        )
    mode = vllm_config.compilation_config.cudagraph_mode
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    if counts != [NUM_NEW] * len(PROMPTS):
        raise Failed(f"{NUM_NEW} tokens were asked of each prompt; {counts} came")
    expected = _expected_freed_blocks(vllm_config.max_concurrent_batches)
    if metrics.freed_blocks not in expected:
        raise Failed(
            f"{expected[0]} to {expected[-1]} blocks had to be freed, "
            f"{metrics.freed_blocks} were"
        )
    longest = max(PROMPTS) + NUM_NEW
    return (
        f"{sum(counts)} tokens; {metrics.freed_blocks} blocks freed, at most "
        f"{metrics.peak_sequence_kv_tokens} of {longest} tokens held by a sequence "
        f"(bound {bound * BLOCK_SIZE}); prompt steps end where they must; "
        f"CUDA graphs {getattr(mode, 'name', mode)}"
    )


CHECKS: dict[str, Callable[[], str]] = {
    "versions": check_versions,
    "hooks": check_hooks,
    "registration": check_registration,
    "kernels": check_kernels,
    "engine": check_engine,
}


def run(name: str) -> Result:
    """Run one check, whatever it raises."""
    try:
        return Result(name, "PASS", CHECKS[name]())
    except Skipped as reason:
        return Result(name, "SKIP", str(reason))
    except Failed as finding:
        return Result(name, "FAIL", str(finding))
    # a broken installation may raise anything, which is what the report is for
    except Exception as error:
        return Result(
            name,
            "FAIL",
            f"{type(error).__name__}: {error}\n{traceback.format_exc().rstrip()}",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and write the report.

    Args:
        arguments: Of the command line.

    Returns:
        The exit status, 0 if no check failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vllm_roco.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CHECKS,
        default=list(CHECKS),
        metavar="CHECK",
        help=f"run these checks only: {', '.join(CHECKS)}",
    )
    chosen = parser.parse_args(arguments).only
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    failed = False
    for name in chosen:
        result = run(name)
        failed |= result.verdict == "FAIL"
        sys.stdout.write(f"{result}\n")
        sys.stdout.flush()
    sys.stdout.write(f"vllm_roco.verify: {'FAIL' if failed else 'PASS'}\n")
    return int(failed)


def _check_step_ends(steps: Sequence[dict[str, Any]]) -> None:
    """Raise unless every step of a prompt ended where RoCo asks vLLM to end it.

    Args:
        steps: Lines of the trace.
    """
    reached: dict[str, int] = {}
    for step in steps:
        request, end = step["request"], step["computed_tokens"]
        reached.setdefault(request, 0)
        # vLLM names requests in the order of their prompts
        num_prompt = PROMPTS[[*reached].index(request)]
        begin, reached[request] = reached[request], end
        if begin < num_prompt:
            least, most = next_step_ends(
                begin, num_prompt, num_prompt, CHUNK, _SCHEDULE
            )
            if not least <= end <= most:
                raise Failed(
                    f"a step that read a prompt of {num_prompt} tokens from {begin} on "
                    f"ended at {end}, not between {least} and {most}: vLLM does not "
                    "ask RoCo's scheduler where steps may end"
                )
    if len(reached) != len(PROMPTS):
        raise Failed(f"the trace tells of {len(reached)} of {len(PROMPTS)} requests")


def _expected_freed_blocks(steps_in_flight: int) -> range:
    """Return how many blocks the engine check may free.

    Args:
        steps_in_flight: Most steps that run at a time, the one being scheduled
            included.
    """
    # the last token is never computed, and blocks are freed when a step is scheduled:
    # all that steps before the last evicted, or less if those are still in flight
    most, least = (
        sum(_SCHEDULE.evicted_blocks(n + NUM_NEW - 1 - steps) for n in PROMPTS)
        for steps in (1, steps_in_flight)
    )
    return range(least, most + 1)


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    sys.exit(main())
