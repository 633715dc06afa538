# SPDX-License-Identifier: Apache-2.0
"""What in the documents follows from the code and the tests alone."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

import vllm_roco
from tools import file_map
from tools.docs_site import as_on_site
from vllm_roco.compat import TESTED_VLLM
from vllm_roco.config import RocoConfig
from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.prefix_scheduler import MAX_WAITS_PER_STEP
from vllm_roco.request_options.planner import RequestPlanner
from vllm_roco.request_plans import ResolvedPlan

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "patches" / "README.md",
]


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


def test_pages_tell_what_a_larger_budget_of_a_request_comes_to() -> None:
    """The bound of the start-up line was said to hold for every sequence."""
    plan = RequestPlanner(RocoConfig(max_budget=8192), 16).plan(
        {"roco_budget": 8192}, 10_000
    )
    held = 16 * ResolvedPlan.of(plan, 16, 2, 10**6).max_blocks
    page = " ".join((ROOT / "docs" / "options.md").read_text().split())
    assert "`max_budget` 8192 and else the defaults, one that asks for that" in page
    assert f"budget holds up to {held:,} tokens" in page


def test_the_example_of_a_request_evicts_what_its_page_says() -> None:
    page = (ROOT / "docs" / "request-options.md").read_text()
    (example,) = re.findall(r"^curl .*? -d '({.*?^})'$", page, re.MULTILINE | re.DOTALL)
    (freed,) = re.findall(r"^vllm:roco_freed_blocks_total{.*} ([\d.]+)$", page, re.M)
    body = json.loads(example)
    for num_prompt_tokens in (4, 8):
        planner = RequestPlanner(RocoConfig(max_budget=8192), 16)
        row = planner.plan(body["vllm_xargs"], num_prompt_tokens).row
        computed = num_prompt_tokens + body["max_tokens"] - 2
        assert row.schedule(16).evicted_blocks(computed) == float(freed)


def test_the_page_of_files_has_every_module() -> None:
    """`python -m tools.file_map --write` makes it anew."""
    assert file_map.PAGE.read_text() == file_map.page()


def test_what_contributing_names_is_there() -> None:
    """Files by the end of their path, other names as words of some source.

    One that ends in an underscore is how several begin.
    """
    page = (ROOT / "CONTRIBUTING.md").read_text()
    files = [
        path
        for folder in ("vllm_roco", "tests", "benchmarks", "tools", "docs")
        for path in (ROOT / folder).rglob("*")
    ]
    source = "".join(path.read_text() for path in files if path.suffix == ".py")
    words = {*re.findall(r"\w+", source)}
    told = page[page.index("## How the code") : page.index("## Tests")]
    for name in re.findall(r"`(\w[\w./]*)`", told):
        if re.search(r"/|\.(py|md|json|toml|yml)$", name):
            end = name.rstrip("/")
            there = any(f"/{path.as_posix()}".endswith(f"/{end}") for path in files)
            assert there or (ROOT / end).exists(), name
        elif re.search("[_A-Z]", name):
            for word in re.findall(r"\w+", name):
                several = word.endswith("_") and any(
                    other.startswith(word) for other in words
                )
                assert several or word in words, name


def test_prefix_caching_tells_how_many_requests_a_step_leaves_waiting() -> None:
    page = " ".join((ROOT / "docs" / "prefix-caching.md").read_text().split())
    assert f"leaves at most {MAX_WAITS_PER_STEP} requests waiting" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_as_shown_by_a_test_is_there(page: Path) -> None:
    """Two tests had moved on, and the table named their old places."""
    named = set(re.findall(r"`(tests/[\w/.]+)[` ]", page.read_text()))
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_a_page_runs_are_there(page: Path) -> None:
    ours = r"python -m ((?:benchmarks|tests|tools|vllm_roco)[\w.]*)"
    for module in re.findall(ours, page.read_text()):
        path = ROOT.joinpath(*module.rstrip(".").split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_modules_that_a_page_runs_are_there(page: Path) -> None:
    """Each stands in the source of the package that is run."""
    text = page.read_text().replace("\\\n", " ")
    commands = re.findall(
        r"python -m ((?:benchmarks|tests|tools|vllm_roco)\.[a-z_.]*\w)([^`|\n#]*)", text
    )
    for module, words in commands:
        # what follows goes to another program
        options = re.findall(r"(?<= )--[a-z][a-z-]*", words.split(" -- ")[0])
        parts = module.split(".")
        folder = ROOT.joinpath(*parts[:2] if len(parts) > 2 else parts)
        files = [folder.with_suffix(".py"), *folder.rglob("*.py")]
        source = "".join(file.read_text() for file in files if file.exists())
        for option in options:
            assert f'"{option}"' in source, f"{module} {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_work_on_a_forge(page: Path) -> None:
    """On the site, MkDocs looks at them."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match("[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Return the names that a forge gives to the headings of a page."""
    headings = re.findall("^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


def without_code(text: str) -> str:
    return re.sub("^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def test_links_are_turned_to_the_places_that_pages_have_on_the_site() -> None:
    """Those of code are of no page: they stay as they are written."""
    text = (
        "[a](docs/options.md#modes) [b\n  c](CONTRIBUTING.md) ![d](docs/pictures/d)\n"
        "```\n[e](docs/options.md)\n```\n[f](vllm_roco/policy.py) [g](#h) [i](h://j)\n"
    )
    assert as_on_site(text, "index.md") == (
        "[a](options.md#modes) [b\n  c](contributing.md) ![d](pictures/d)\n"
        "```\n[e](docs/options.md)\n```\nf [g](#h) [i](h://j)\n"
    )
    here = "[a](../vllm_roco/policy.py) [b](../README.md) [c](options.md)"
    assert as_on_site(here, "policy.md", "https://forge/x/") == (
        "[a](https://forge/x/blob/main/vllm_roco/policy.py) "
        "[b](index.md) [c](options.md)"
    )
    missing = "[a](docs/no-such-page.md) [b](no_such_module.py)"
    assert as_on_site(missing, "index.md") == missing.replace("docs/", "")


def test_lists_inside_of_lists_are_lists_on_the_site_too() -> None:
    assert as_on_site("* a\n  * b\n    c\n", "policy.md") == "* a\n    * b\n    c\n"


def test_every_file_that_tells_the_version_tells_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert project["version"] == vllm_roco.__version__
    assert f"\nversion: {vllm_roco.__version__}\n" in citation
    assert f"\nVersion {vllm_roco.__version__}," in (ROOT / "README.md").read_text()


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
