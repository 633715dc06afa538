# SPDX-License-Identifier: Apache-2.0
"""Passkey accuracy against budget and stride, through vLLM itself.

    python -m benchmarks.quality.passkey --out benchmarks/results

For every setting one engine answers `--prompts` passkey prompts at evenly spread
depths; the full cache comes first. Appends to `passkey.csv` after every setting and
leaves out the settings that the file has already, so that a run cut short goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import csv
import gc
import time
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from scipy.stats import binomtest
from tqdm import tqdm
from vllm import LLM, SamplingParams

from tools.passkey import Passkey, build_passkey
from tools.smollm2 import smollm2_path


@dataclass(frozen=True)
class Setting:
    """One engine; a budget of 0 stands for the full cache.

    Attributes:
        context: Most tokens of a prompt.
        policy: `full`, `recent`, `roco/peak` or `roco/deviation`.
        budget: Tokens kept.
        stride: Tokens evicted at a time.
        chunk: Prompt tokens read per step.
    """

    context: int
    policy: str
    budget: int
    stride: int
    chunk: int


def settings(context: int) -> list[Setting]:
    """Return the grid: accuracy against the budget, then against the stride."""
    grid = [Setting(context, "full", 0, 0, 0)]
    for share in (2, 4, 8):
        for policy in ("roco/peak", "roco/deviation", "recent"):
            grid.append(Setting(context, policy, context // share, 128, 256))
    for stride in (16, 64, 256):
        grid.append(Setting(context, "roco/peak", context // 8, stride, stride))
    return grid


def found(setting: Setting, tasks: list[Passkey], arguments: argparse.Namespace) -> int:
    """Start an engine and return how many keys it finds."""
    options: dict[str, object] = {}
    if setting.budget:
        policy, _, shield = setting.policy.partition("/")
        options = {"policy": policy, **({"shield": shield} if shield else {})}
        for key in ("budget", "stride", "chunk"):
            options[key] = getattr(setting, key)
    llm = LLM(
        arguments.model or str(smollm2_path()),
        attention_backend="roco" if setting.budget else None,
        additional_config={"roco": options} if setting.budget else {},
        max_model_len=setting.context + 64,
        max_num_seqs=32,
        max_num_batched_tokens=4096,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    )
    outputs = llm.generate(
        [{"prompt_token_ids": task.token_ids} for task in tasks],
        SamplingParams(temperature=0, max_tokens=8),
        use_tqdm=False,
    )
    count = sum(
        task.is_answered_by(output.outputs[0].text)
        for task, output in zip(tasks, outputs, strict=True)
    )
    # the engine's process ends when its handle is collected
    del llm
    gc.collect()
    time.sleep(2)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="Hugging Face folder; default: SmolLM2")
    parser.add_argument("--context", type=int, nargs="+", default=[2048])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1000)
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model or smollm2_path())
    names = [field.name for field in fields(Setting)]
    results = ["n", "seed", "score", "ci_low", "ci_high"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = arguments.out / "passkey.csv"
    done = set()
    if table.exists():
        with table.open() as file:
            done = {tuple(row[name] for name in names) for row in csv.DictReader(file)}
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*names, *results])
        if not done:
            writer.writeheader()
        for context in arguments.context:
            tasks = [
                build_passkey(
                    tokenizer,
                    num_tokens=context,
                    depth=(i + 0.5) / arguments.prompts,
                    seed=arguments.seed + i,
                )
                for i in range(arguments.prompts)
            ]
            todo = [s for s in settings(context) if _key(s) not in done]
            for setting in tqdm(todo, desc=f"passkey at {context} tokens"):
                count = found(setting, tasks, arguments)
                interval = binomtest(count, len(tasks)).proportion_ci(method="wilson")
                row = {
                    "n": len(tasks),
                    "seed": arguments.seed,
                    "score": round(count / len(tasks), 4),
                    "ci_low": round(interval.low, 4),
                    "ci_high": round(interval.high, 4),
                }
                writer.writerow(asdict(setting) | row)
                file.flush()


def _key(setting: Setting) -> tuple[str, ...]:
    return tuple(str(value) for value in astuple(setting))


if __name__ == "__main__":
    main()
