# SPDX-License-Identifier: Apache-2.0
"""How near `plan_decode` comes to the best plan of a sweep. Needs no GPU.

    python -m benchmarks.kernels.score_plans DIR/decode_sweep.json

A plan that was not swept is judged by the one with the nearest number of splits.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from vllm_roco.ops.decode.plan import DecodePlan, plan_decode
from vllm_roco.ops.device import H100


def planned(shape: dict[str, int]) -> DecodePlan:
    """Return what the engine would run for a shape on an H100."""
    return plan_decode(
        num_rows=shape["batch"],
        num_kv_heads=shape["kv_heads"],
        head_size=shape["head_size"],
        max_live_tokens=shape["context"],
        dtype=torch.bfloat16,
        device=H100,
    )


def score(row: dict[str, Any]) -> float:
    """Return best time / planned time of one shape of a sweep."""
    plan = planned(row["shape"])

    def distance(swept: dict[str, Any]) -> float:
        alike = all(
            swept[name] == getattr(plan, name)
            for name in ("tile", "num_warps", "num_stages")
        )
        return abs(math.log(swept["splits"] / plan.splits)) if alike else math.inf

    nearest = min(row["plans"], key=distance)
    if distance(nearest) == math.inf:
        raise ValueError(f"{plan} is none of the swept plans of {row['shape']}.")
    return float(row["plans"][0]["us"] / nearest["us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    rows = json.loads(parser.parse_args().sweep.read_text())["shapes"]
    scores = [score(row) for row in rows]
    for row, value in sorted(zip(rows, scores, strict=True), key=lambda x: x[1]):
        print(f"{value:.3f}  {planned(row['shape'])}  {row['shape']}")
    mean = math.exp(sum(map(math.log, scores)) / len(scores))
    print(f"geometric mean {mean:.4f}, worst {min(scores):.3f}")


if __name__ == "__main__":
    main()
