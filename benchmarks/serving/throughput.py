# SPDX-License-Identifier: Apache-2.0
"""Output tokens per second with a KV budget and without, by vLLM's own benchmark.

    python -m benchmarks.serving.throughput --out benchmarks/results \
        --gpu-memory-utilization 0.5 0.3 0.25

The default workload is the stress test that a port of R-KV to vLLM publishes: 256
requests of 700 + 1,024 tokens on a model of Qwen2.5-7B's shape, budget 256. Weights are
random: they do not change what attention costs. Every ratio's two sides run one after
the other in one process, `vllm bench throughput` each.

Appends to `serving.csv` after every run, so that a run cut short keeps what it has, and
writes the versions to `serving.json`.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from vllm.benchmarks import throughput
from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.kernels.measuring import environment
from tools.smollm2 import smollm2_path

MODELS = Path(__file__).parents[1] / "models"
COLUMNS = [
    "workload",
    "model",
    "gpu",
    "commit",
    "gpu_memory_utilization",
    "backend",
    "kv_cache_dtype",
    "policy",
    "shield",
    "budget",
    "stride",
    "chunk",
    "num_requests",
    "input_len",
    "output_len",
    "output_tok_s",
]


def variants(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield what distinguishes the runs at one memory size."""
    budget = {
        "budget": arguments.budget,
        "stride": arguments.stride,
        "chunk": arguments.chunk,
    }
    yield {"backend": "FLASH_ATTN", "kv_cache_dtype": "auto"}
    if arguments.fp8:
        yield {"backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"}
    roco = {"backend": "ROCO", "kv_cache_dtype": "auto", **budget}
    yield {**roco, "policy": "recent"}
    yield {**roco, "policy": "roco", "shield": "peak"}


def output_tokens_per_second(
    variant: dict[str, object], memory: float, arguments: argparse.Namespace
) -> float:
    """Run `vllm bench throughput` once."""
    options = {
        key: variant[key]
        for key in ("policy", "shield", "budget", "stride", "chunk")
        if key in variant
    }
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command = [
            f"--model={MODELS / arguments.model}",
            f"--tokenizer={arguments.tokenizer or smollm2_path()}",
            "--load-format=dummy",
            "--dataset-name=random",
            f"--random-input-len={arguments.input_len}",
            f"--random-output-len={arguments.output_len}",
            f"--num-prompts={arguments.num_requests}",
            "--num-warmups=4",
            f"--max-num-seqs={arguments.num_requests}",
            f"--max-model-len={arguments.max_model_len}",
            f"--gpu-memory-utilization={memory}",
            "--no-enable-prefix-caching",
            "--disable-detokenize",
            f"--attention-backend={variant['backend']}",
            f"--kv-cache-dtype={variant['kv_cache_dtype']}",
            f"--additional-config={json.dumps({'roco': options} if options else {})}",
            f"--output-json={result.name}",
            *arguments.engine_arguments,
        ]
        parser = FlexibleArgumentParser()
        throughput.add_cli_args(parser)
        throughput.main(parser.parse_args(command))
        elapsed = json.loads(Path(result.name).read_text())["elapsed_time"]
    # the engine's process ends when its handle is collected; its memory is needed next
    gc.collect()
    time.sleep(3)
    return float(arguments.num_requests * arguments.output_len / elapsed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workload", default="r-kv stress")
    parser.add_argument("--model", default="qwen2.5-7b", help="folder of models/")
    parser.add_argument("--tokenizer", help="folder; default: SmolLM2's")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, nargs="+", default=[0.5, 0.3, 0.25]
    )
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=700)
    parser.add_argument("--output-len", type=int, default=1024)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument(
        "--fp8", action="store_true", help="also FLASH_ATTN with fp8 KV"
    )
    parser.add_argument(
        "engine_arguments", nargs="*", help="after --, for every engine"
    )
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    # in a process of its own: engines are forked while CUDA is not yet in use
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        facts = pool.apply(environment)
    (arguments.out / "serving.json").write_text(json.dumps(facts, indent=1) + "\n")
    table = arguments.out / "serving.csv"
    is_new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        for memory in arguments.gpu_memory_utilization:
            for variant in variants(arguments):
                speed = output_tokens_per_second(variant, memory, arguments)
                row = {
                    "workload": arguments.workload,
                    "model": arguments.model,
                    "gpu": facts["gpu"],
                    "commit": facts["commit"],
                    "gpu_memory_utilization": memory,
                    "num_requests": arguments.num_requests,
                    "input_len": arguments.input_len,
                    "output_len": arguments.output_len,
                    "output_tok_s": round(speed),
                }
                writer.writerow(row | variant)
                file.flush()
                print(f"at {memory}: {variant}: {speed:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
