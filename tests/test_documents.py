# SPDX-License-Identifier: Apache-2.0
"""What in the documents follows from the code and the tests alone."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import vllm_roco
from vllm_roco.compat import TESTED_VLLM
from vllm_roco.config import RocoConfig
from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.prefix_scheduler import MAX_WAITS_PER_STEP

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_the_front_page_tells_the_bound_of_the_defaults() -> None:
    config = RocoConfig()
    schedule = EvictionSchedule(16, config.budget, config.stride)
    # asynchronous scheduling has two steps in flight
    held = schedule.max_blocks(2 * config.chunk) * schedule.block_size
    page = " ".join((ROOT / "README.md").read_text().split())
    assert f"budget {config.budget:,}, stride {config.stride}" in page
    assert f"chunk {config.chunk:,}" in page
    assert f"at most {schedule.max_live_tokens():,} tokens after a step" in page
    assert f"holds at most {held:,} tokens" in page


def test_how_it_works_tells_how_many_requests_a_step_leaves_waiting() -> None:
    page = " ".join((ROOT / "docs" / "how-it-works.md").read_text().split())
    assert f"leaves at most {MAX_WAITS_PER_STEP} requests waiting" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_as_shown_by_a_test_is_there(page: Path) -> None:
    """Two tests had moved on, and the table named their old places."""
    named = set(re.findall(r"`(tests/[\w/.]+)[` ]", page.read_text()))
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_every_file_that_tells_the_version_tells_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert project["version"] == vllm_roco.__version__
    assert f"\nversion: {vllm_roco.__version__}\n" in citation


def test_the_image_is_of_a_tested_release() -> None:
    named = re.findall(r"^ARG VLLM_VERSION=(.+)$", dockerfile(), re.MULTILINE)
    assert len(named) == 1 and named[0] in TESTED_VLLM


def test_the_image_is_built_of_all_that_the_package_is_built_of() -> None:
    """What is not copied, or ignored, is not there when the wheel is built."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    sources = re.findall("^COPY (?!--)(.*) .+$", dockerfile(), re.MULTILINE)
    copied = {source for line in sources for source in line.split()}
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= copied


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()
