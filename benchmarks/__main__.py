# SPDX-License-Identifier: Apache-2.0
"""From results to pages: keeps rows, and makes tables and pictures of them.

    python -m benchmarks keep DIR          # add the rows that a benchmark wrote to DIR
    python -m benchmarks report --write    # put the tables into the pages
    python -m benchmarks plot              # draw the pictures

`report` and `plot` also show another folder: `--results DIR`, without `--write`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import markdown, rows
from benchmarks.headline import headline
from benchmarks.quality.pictures import PICTURES as QUALITY_PICTURES
from benchmarks.quality.tables import tables as quality_tables
from benchmarks.serving.pictures import PICTURES as SERVING_PICTURES
from benchmarks.serving.tables import tables as serving_tables

REPOSITORY = Path(__file__).parents[1]
PAGES = (
    *("README.md", "docs/performance.md", "docs/where-the-time-goes.md"),
    "docs/requests-a-second.md",
    "docs/quality.md",
)
PICTURES = {**SERVING_PICTURES, **QUALITY_PICTURES}
FOLDER = REPOSITORY / "docs" / "pictures"
GROWING = (
    *("serving", "serving_online", "prefill", "prefixes", "memory"),
    *("scheduler", "request_options"),
)
"""Tables that keep their rows when others are added."""


def tables(results: Path) -> dict[str, str]:
    """Return every table of the pages by its name.

    Args:
        results: Folder of the CSV files.
    """
    return {
        "headline": headline(results),
        **serving_tables(results),
        **quality_tables(results),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("keep", help="add another folder's tables")
    adding.add_argument("source", type=Path)
    report = commands.add_parser("report", help="print the tables, or write them")
    report.add_argument(
        "--write",
        type=Path,
        nargs="*",
        metavar="FILE",
        help=f"put them into these pages; by default {', '.join(PAGES)}",
    )
    plot = commands.add_parser("plot", help="draw the pictures")
    plot.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    for command in (adding, report, plot):
        command.add_argument(
            "--results", type=Path, default=rows.RESULTS, metavar="DIR"
        )
    arguments = parser.parse_args()

    results: Path = arguments.results
    if arguments.command == "keep":
        for path in rows.keep(arguments.source, results, GROWING):
            print(path)
    elif arguments.command == "plot":
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, picture in PICTURES.items():
            path = arguments.out / f"{name}.svg"
            if picture.write(results, path):
                print(path)
    elif arguments.write is None:
        for name, text in tables(results).items():
            if text != markdown.UNMEASURED:
                print(f"## {name}\n\n{text}\n")
    else:
        found = tables(results)
        for page in arguments.write or [REPOSITORY / name for name in PAGES]:
            page.write_text(markdown.fill(page.read_text(), found), encoding="utf-8")


if __name__ == "__main__":
    main()
