# SPDX-License-Identifier: Apache-2.0
"""One process of a run: reads a job from a file and appends what comes of it.

    python -m benchmarks.quality.worker JOB.json

`benchmarks.quality` starts it; by hand it repeats what failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from pathlib import Path

from benchmarks.quality.cells import Cell
from benchmarks.quality.outcomes import Outcome, append


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", type=Path)
    job = json.loads(parser.parse_args().job.read_text())

    cells = [Cell.from_json(fields) for fields in job["cells"]]
    # vLLM and torch are imported by the one that is needed
    runner = importlib.import_module(f"benchmarks.quality.with_{cells[0].setup.engine}")
    for cell, metrics in runner.measure(job["model"], cells):
        outcome = Outcome(cell, metrics, device_name(), job["commit"])
        append(Path(job["outcomes"]), outcome)


def device_name() -> str:
    """Return what the figures were measured on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()})"


if __name__ == "__main__":
    main()
