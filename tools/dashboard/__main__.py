# SPDX-License-Identifier: Apache-2.0
"""Scrape a server while a command runs, ask for every panel, draw the dashboard."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.dashboard import DashboardError
from tools.dashboard.panels import ALERTS, Panel, panels
from tools.dashboard.picture import Answers, draw_dashboard
from tools.dashboard.prometheus import Prometheus, running_prometheus

SCRAPE_SECONDS = 5
RATE_INTERVAL = f"{4 * SCRAPE_SECONDS}s"
"""As Grafana has it for lines of one value a scrape."""


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.dashboard")
    parser.description = __doc__
    parser.add_argument("url", help="the running server, such as http://localhost:8000")
    parser.add_argument("--picture", type=Path, default=Path("dashboard.svg"))
    parser.add_argument("command", nargs="+", help="runs meanwhile; begins after --")
    arguments = parser.parse_args()
    try:
        return show(arguments.url, arguments.command, arguments.picture)
    except DashboardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def show(url: str, command: list[str], picture: Path) -> int:
    """Draw what a server's metrics tell of a command's work, and name empty panels.

    Returns:
        0 if the command ended well and every query answered something.

    Raises:
        DashboardError: Prometheus does not run, or does not reach the server.
    """
    with (
        tempfile.TemporaryDirectory(prefix="roco-") as folder,
        running_prometheus(
            url, Path(folder), rules=ALERTS, scrape_seconds=SCRAPE_SECONDS
        ) as prometheus,
    ):
        begin = time.time()
        status = subprocess.run(command, check=False).returncode
        # what ended it is scraped, too
        time.sleep(2 * SCRAPE_SECONDS)
        end = time.time()
        shown, empty = [], []
        for panel in panels(RATE_INTERVAL):
            answers, unanswered = ask(prometheus, panel, begin, end)
            shown.append((panel, answers))
            empty += unanswered
        print("alerts that fire:", ", ".join(prometheus.firing()) or "none")
    for line in empty:
        print(f"no answer: {line}")
    draw_dashboard(picture, shown, begin, end)
    print(f"picture: {picture}")
    return status or int(bool(empty))


def ask(
    prometheus: Prometheus, panel: Panel, begin: float, end: float
) -> tuple[Answers, list[str]]:
    """Return the lines of a panel, and the queries that answered nothing."""
    answers, empty = {}, []
    for target in panel.targets:
        found = prometheus.series(target.expression, begin, end, SCRAPE_SECONDS)
        answers.update({target.name(each.labels): each for each in found})
        if not found:
            empty.append(f"{panel.title}, {target.legend}")
    return answers, empty


if __name__ == "__main__":
    sys.exit(main())
