# SPDX-License-Identifier: Apache-2.0
"""The dashboard against Grafana's own schema, of the oldest release that it is for.

Grafana generates the classes of `grafana-foundation-sdk` from its schema. They read
anything, so what is read has to come back whole and with the declared types.
"""

from __future__ import annotations

import copy
import enum
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tools.dashboard.panels import DASHBOARD


def faults(dashboard: dict[str, Any]) -> list[str]:
    """Return where a dashboard breaks the schema: unknown keys, wrong types."""
    plugins.register_default_plugins()
    read = Dashboard.from_json(dashboard)
    written = json.loads(JSONEncoder().encode(read))
    return [*_lost(dashboard, written, "dashboard"), *_mistyped(read, "dashboard")]


def _lost(value: Any, read: Any, place: str) -> Iterator[str]:
    if isinstance(value, dict) and isinstance(read, dict):
        for key, inner in value.items():
            if key not in read:
                yield f"{place}.{key} is unknown"
            else:
                yield from _lost(inner, read[key], f"{place}.{key}")
    elif isinstance(value, list) and isinstance(read, list):
        for number, pair in enumerate(zip(value, read, strict=True)):
            yield from _lost(*pair, f"{place}[{number}]")
    elif value != read:
        yield f"{place} is {value!r}, read as {read!r}"


def _mistyped(value: Any, place: str) -> Iterator[str]:
    """Compare the attributes of what was read with their annotations."""
    if isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _mistyped(inner, f"{place}[{number}]")
    elif hasattr(value, "to_json"):
        for name, wanted in typing.get_type_hints(type(value)).items():
            held = getattr(value, name)
            if not _fits(held, wanted):
                yield f"{place}.{name} is {held!r}, not {wanted}"
            yield from _mistyped(held, f"{place}.{name}")


def _fits(value: Any, wanted: Any) -> bool:
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted in (Any, object):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(each, inner[1]) for each in value.values()
        )
    if issubclass(wanted, enum.Enum):
        return value in [each.value for each in wanted]
    if isinstance(value, bool) or wanted is bool:
        return isinstance(value, bool) and wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def test_the_dashboard_follows_grafanas_schema() -> None:
    assert faults(DASHBOARD) == []


@pytest.mark.parametrize(
    "keys, value",
    [
        (("refreshing",), "10s"),
        (("schemaVersion",), "39"),
        (("graphTooltip",), 3),
        (("templating", "list", 1, "refresh"), 7),
        (("panels", 1, "gridPos", "w"), "12"),
        (("panels", 1, "options", "legend", "placing"), "bottom"),
        (("panels", 1, "options", "tooltip", "mode"), "many"),
        (("panels", 1, "fieldConfig", "defaults", "custom", "drawStyle"), "lines"),
        (("panels", 1, "targets", 0, "legend"), "held"),
        (("panels", 1, "targets", 0, "expr"), 1),
    ],
    ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else None,
)
def test_a_fault_is_found(keys: tuple[str | int, ...], value: Any) -> None:
    broken = copy.deepcopy(DASHBOARD)
    place: Any = broken
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    assert faults(broken) != []
