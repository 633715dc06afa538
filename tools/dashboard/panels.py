# SPDX-License-Identifier: Apache-2.0
"""The panels of `docs/grafana/dashboard.json`, with Grafana's variables filled in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
ALERTS = FOLDER / "alerts.yml"


@dataclass(frozen=True)
class Target:
    """One query of a panel.

    Attributes:
        expression: In PromQL, without variables.
        legend: What its lines are called; `{{label}}` stands for a label's value.
    """

    expression: str
    legend: str

    def name(self, labels: Mapping[str, str]) -> str:
        """Return what the line of these labels is called."""
        name = self.legend
        for label, value in labels.items():
            name = name.replace(f"{{{{{label}}}}}", value)
        return name


@dataclass(frozen=True)
class Panel:
    """One panel, or the heading of a row of them, which has no targets.

    Attributes:
        title: Its heading.
        unit: Grafana's name of its unit, such as `percentunit`; empty for a heading.
        place: `x`, `y`, `w` and `h`, in cells of which 24 fill the width.
        targets: Its queries.
    """

    title: str
    unit: str
    place: Mapping[str, int]
    targets: tuple[Target, ...]


def panels(rate_interval: str) -> list[Panel]:
    """Return all of them for every model and engine, as they stand in the file.

    Args:
        rate_interval: What Grafana would say for `$__rate_interval`, such as `20s`.
    """
    values = {"$model": ".*", "$engine": ".*", "$__rate_interval": rate_interval}

    def filled(expression: str) -> str:
        for name, value in values.items():
            expression = expression.replace(name, value)
        return expression

    return [
        Panel(
            title=panel["title"],
            unit=panel.get("fieldConfig", {}).get("defaults", {}).get("unit", ""),
            place=panel["gridPos"],
            targets=tuple(
                Target(filled(target["expr"]), target["legendFormat"])
                for target in panel.get("targets", [])
            ),
        )
        for panel in DASHBOARD["panels"]
    ]
