# SPDX-License-Identifier: Apache-2.0
"""What a budget costs in quality: one command from the grid to the plots.

    python -m benchmarks.quality run --preset quick --out DIR
    python -m benchmarks.quality plot --out DIR
    python -m benchmarks.quality report --out DIR

`run` measures what `DIR/quality_outcomes.jsonl` does not have yet, the most telling
cells first, and writes `quality.csv` and `quality.json`. `plot` draws the pictures of
the table, `report` prints it as Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality import running
from benchmarks.quality.grid import PRESETS
from benchmarks.quality.tasks import FIRST_REPORT_SEED


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("--preset", choices=PRESETS, default="quick")
    run.add_argument("--model", help="Hugging Face folder; default: SmolLM2-135M")
    run.add_argument(
        "--n", type=int, help="most problems a cell; default: the preset's"
    )
    run.add_argument(
        "--seed",
        type=int,
        default=FIRST_REPORT_SEED,
        help="defaults are tuned on seeds below %(default)s",
    )
    run.add_argument("--tasks", nargs="+", help="only these")
    run.add_argument("--methods", nargs="+", help="only these and the full cache")
    run.add_argument("--parallel", type=int, default=2, help="processes at once")
    run.add_argument(
        "--time-limit", type=float, default=3600, metavar="SECONDS", help="then end"
    )
    run.add_argument("--commit", help="to be named in the table; default: git's")
    run.add_argument("--dry-run", action="store_true", help="only say what would run")
    plot = commands.add_parser("plot", help="draw SVG and PNG")
    report = commands.add_parser("report", help="print Markdown tables")
    for command in (run, plot, report):
        command.add_argument("--out", type=Path, required=True, metavar="DIR")
    report.add_argument(
        "--into",
        type=Path,
        nargs="+",
        metavar="FILE",
        default=[],
        help="documents whose sections to replace, instead of printing",
    )
    plot.add_argument("--pictures", type=Path, help="folder; default: DIR")
    arguments = parser.parse_args()

    if arguments.command == "run":
        running.run(arguments)
    elif arguments.command == "plot":
        from benchmarks.quality.plots import draw

        for path in draw(arguments.out / running.TABLE, arguments.pictures):
            print(path)
    else:
        from benchmarks.quality.report import fill, markdown

        for document in arguments.into:
            fill(document, arguments.out / running.TABLE)
        if not arguments.into:
            print(markdown(arguments.out / running.TABLE))


if __name__ == "__main__":
    main()
