# SPDX-License-Identifier: Apache-2.0
"""The dashboard and the alerts: what they show exists, in a form that is taken."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.releases import release_path
from tools.dashboard.panels import ALERTS, DASHBOARD, panels
from vllm_roco.compat import TESTED_VLLM
from vllm_roco.observability.families import FAMILIES, REQUEST_BOUND

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"datasource", "model", "engine", "__rate_interval"}

ROCO = {family.sample_name for family in FAMILIES} | {
    f"{REQUEST_BOUND.name}_{suffix}" for suffix in ("bucket", "sum", "count")
}


def dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def alert_expressions() -> list[str]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["expr"] for rule in group["rules"]]


def metrics_in(expressions: list[str]) -> set[str]:
    return set(re.findall(r"vllm:\w+", " ".join(expressions)))


def vllm_metrics(version: str) -> set[str]:
    """Return the names of the lines that a release shows, read from its source."""
    source = release_path(version) / "vllm" / "v1" / "metrics" / "loggers.py"
    names = set()
    for kind, name in re.findall(
        r'self\._(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"',
        source.read_text(),
    ):
        suffixes = {"counter": ["_total"], "gauge": [""]}.get(
            kind, ["_bucket", "_sum", "_count"]
        )
        names |= {name + suffix for suffix in suffixes}
    return names


@pytest.mark.parametrize("version", TESTED_VLLM)
@pytest.mark.parametrize("expressions", [dashboard_expressions, alert_expressions])
def test_every_metric_exists(expressions: Any, version: str) -> None:
    used = metrics_in(expressions())
    assert {name for name in used if "roco" in name} <= ROCO
    assert {name for name in used if "roco" not in name} <= vllm_metrics(version)


def test_the_dashboard_shows_every_metric_of_ours() -> None:
    assert metrics_in(dashboard_expressions()) >= ROCO


def test_the_dashboard_has_the_shape_that_grafana_imports() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["uid"] and DASHBOARD["title"]
    # with one, Grafana would put it in the place of a dashboard of that number
    assert DASHBOARD.get("id") is None
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len({*numbers}) == len(numbers)
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["title"] and panel["description"]
        assert panel["datasource"] == source
        assert panel["fieldConfig"].keys() == {"defaults", "overrides"}
        references = [target["refId"] for target in panel["targets"]]
        assert len({*references}) == len(references) > 0
        for target in panel["targets"]:
            assert target["datasource"] == source and target["legendFormat"]
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    assert variables == VARIABLES - {"__rate_interval"}
    used = re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))
    # that of all values of a variable
    assert {*used} == {*VARIABLES, "__all"}


def test_no_panel_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + column, place["y"] + line)
            for column in range(place["w"])
            for line in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells


def promtool(*arguments: str | Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool, of Debian's package prometheus")
    run = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_prometheus_reads_every_expression(tmp_path: Path) -> None:
    filled = [target.expression for panel in panels("1m") for target in panel.targets]
    rules = [
        {"record": f"dashboard:{number}", "expr": expression}
        for number, expression in enumerate(filled)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", file, ALERTS)


def test_alerts_fire_when_they_have_to(tmp_path: Path) -> None:
    cases = Path(__file__).with_name("alerts_test.yml").read_text()
    file = tmp_path / "alerts_test.yml"
    file.write_text(cases.replace("[RULES]", json.dumps([str(ALERTS)])))
    promtool("test", "rules", file)


def test_prometheus_takes_the_configuration_of_the_page(tmp_path: Path) -> None:
    page = (ALERTS.parents[1] / "dashboard.md").read_text()
    (config,) = re.findall(
        r"^    ```yaml\n(.*?)^    ```", page, re.MULTILINE | re.DOTALL
    )
    (tmp_path / "prometheus.yml").write_text(textwrap.dedent(config))
    shutil.copy(ALERTS, tmp_path)
    promtool("check", "config", tmp_path / "prometheus.yml")


def test_the_page_explains_every_panel_and_alert() -> None:
    page = (ALERTS.parents[1] / "dashboard.md").read_text()
    assert f"The dashboard's {len(PANELS)} panels" in page
    explained = re.findall(r"^\| `?([^|`]+?)`? \|", page, re.MULTILINE)
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    named = [panel["title"] for panel in PANELS]
    named += [rule["alert"] for rule in group["rules"]]
    assert [
        each for each in explained if each not in ("panel", "alert", "---")
    ] == named
