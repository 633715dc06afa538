# SPDX-License-Identifier: Apache-2.0
"""What a budget costs in quality: one command for the whole grid.

    python -m benchmarks.quality run --preset quick --out DIR

It measures what `DIR` does not have yet, the most telling cells first: every problem's
result goes to a `.jsonl` file the moment it is known, and a table is made of them.
`python -m benchmarks report --results DIR` shows the table, `plot` its pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.estimate import estimate
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.run import ORDERS, run
from benchmarks.quality.training.trained import ADAPTERS
from benchmarks.serving.engines import MODELS
from tools.packaged_models import PACKAGED_MODELS


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    presets = "\n".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    measuring = commands.add_parser(
        "run",
        help="measure",
        epilog=f"presets:\n{presets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = measuring.add_argument
    add("--out", type=Path, required=True, metavar="DIR")
    add("--preset", choices=PRESETS, default="quick")
    add(
        "--model",
        help=f"{', '.join((*PACKAGED_MODELS, *ADAPTERS))}, or a Hugging Face folder; "
        "default: the preset's",
    )
    add("--n", type=int, help="most problems a cell; default: the preset's")
    add("--seed", type=int, help="default: the preset's, from 50000 on for reports")
    add("--tasks", nargs="+", help="only these")
    add("--methods", nargs="+", help="only these and what they are compared with")
    add("--contexts", type=int, nargs="+", help="only these", metavar="TOKENS")
    add("--shares", type=float, nargs="+", help="only these budgets over the context")
    add(
        "--order",
        choices=ORDERS,
        default=ORDERS[0],
        help="the most telling cells first, or what is named first by --contexts, "
        "--tasks, --shares and --methods, in this order",
    )
    add(
        "--known",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="results of other runs; what they hold of this preset is taken over",
    )
    add(
        "--at-once",
        action="store_true",
        help="do not wait for the full cache to tell what is worth measuring",
    )
    add("--parallel", type=int, default=2, help="processes at once")
    add("--time-limit", type=float, default=3600, metavar="SECONDS", help="then end")
    add("--commit", help="to be named in the table; default: git's")
    add("--dry-run", action="store_true", help="only say what would run")
    measuring.set_defaults(call=run)

    estimating = commands.add_parser(
        "estimate", help="tell how long a preset takes with a model of another size"
    )
    add = estimating.add_argument
    add("--out", type=Path, required=True, metavar="DIR")
    add("--preset", choices=PRESETS, default="hard")
    add(
        "--shape",
        type=_shape,
        default="qwen2.5-7b",
        help=f"a folder with a config.json, or {', '.join(_shapes())}",
    )
    add("--n", type=int, default=32, help="prompts that are measured")
    add(
        "--pace",
        type=float,
        nargs=3,
        metavar=("START", "READ", "WRITTEN"),
        help="instead of measuring: seconds to start an engine, tokens of prompts and "
        "of answers a second",
    )
    add("--commit", help="to be named; default: git's")
    estimating.set_defaults(call=estimate)

    arguments = parser.parse_args()
    arguments.call(arguments)


def _shapes() -> list[str]:
    return sorted(path.name for path in MODELS.iterdir() if path.is_dir())


def _shape(name: str) -> Path:
    return MODELS / name if name in _shapes() else Path(name)


if __name__ == "__main__":
    main()
