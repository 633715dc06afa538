# SPDX-License-Identifier: Apache-2.0
"""The same problems with kvpress, which sees a whole prompt before it compresses.

    pip install kvpress==0.5.5 scipy      # in an environment of its own
    python -m benchmarks.quality.kvpress_table --out benchmarks/results

kvpress wants an older transformers than vLLM does, hence its own environment, and its
own table, `kvpress.csv`: memory is bounded only once the prompt has been read, and the
first token of an answer comes from the whole cache. Runs on a CPU, a few minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.quality import intervals
from benchmarks.quality.measured import KVPRESS_TABLE
from benchmarks.quality.tasks import FIRST_REPORT_SEED, Problem, build
from tools.smollm2 import smollm2_path

COLUMNS = (
    *("task", "context", "method", "budget_ratio", "n", "seed"),
    *("score", "ci_low", "ci_high", "kvpress"),
)
CELLS = (("needle", 1024, (0.5, 0.25)),)
PRESSES = ("ObservedAttention", "SnapKV")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="Hugging Face folder; default: SmolLM2-135M")
    parser.add_argument("--n", type=int, default=16, help="problems a cell")
    parser.add_argument("--seed", type=int, default=FIRST_REPORT_SEED)
    arguments = parser.parse_args()

    folder = arguments.model or os.environ.get("VLLM_ROCO_SMOLLM2") or smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        # the only one that hands out what ObservedAttention looks at
        attn_implementation="eager",
    )
    with (arguments.out / KVPRESS_TABLE).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for task, context, method, ratio in cells():
            problems = build(task, tokenizer, context, arguments.n, arguments.seed)
            press = press_of(method, ratio)
            scores = [
                problem.score(tokenizer.decode(answer(model, problem, press)))
                for problem in tqdm(problems, desc=f"{task} {context} {method} {ratio}")
            ]
            score = intervals.score("accuracy", tuple(scores))
            names = ("score", "ci_low", "ci_high")
            row = dict(zip(names, (round(value, 4) for value in score), strict=True))
            writer.writerow(
                {
                    "task": task,
                    "context": context,
                    "method": method,
                    "budget_ratio": ratio,
                    "n": arguments.n,
                    "seed": arguments.seed,
                    "kvpress": importlib.metadata.version("kvpress"),
                }
                | row
            )
            file.flush()


def cells() -> Iterator[tuple[str, int, str, float]]:
    """Yield task, context, method and the share that is kept."""
    for task, context, ratios in CELLS:
        yield task, context, "full", 1.0
        for ratio in ratios:
            for method in PRESSES:
                yield task, context, method, ratio


def press_of(method: str, ratio: float) -> Any:
    """Return a press that keeps a share of the prompt; None for the full cache."""
    import kvpress

    if method == "full":
        return None
    return getattr(kvpress, f"{method}Press")(compression_ratio=1 - ratio)


@torch.inference_mode()
def answer(model: Any, problem: Problem, press: Any) -> list[int]:
    """Return the greedy continuation of a prompt that was read and then compressed."""
    cache = DynamicCache()
    length = len(problem.token_ids)
    tokens = torch.tensor([problem.token_ids])
    with press(model) if press else contextlib.nullcontext():
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    written = [int(logits[0, -1].argmax())]
    for position in range(length, length + problem.max_tokens - 1):
        # positions go on as if nothing had been dropped
        logits = model(
            torch.tensor([[written[-1]]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
        ).logits
        written.append(int(logits[0, -1].argmax()))
    return written


if __name__ == "__main__":
    main()
