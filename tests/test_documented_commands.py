# SPDX-License-Identifier: Apache-2.0
"""Every `vllm serve` of the pages is a command that vLLM and RoCo take, unstarted."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.benchmarks.serve import add_cli_args
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.configs import SHAPE
from vllm_roco.config import RocoConfig
from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.request_options.planner import RequestPlanner
from vllm_roco.validation import validated_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = ROOT / "docs" / "recipes.md"
SECTIONS = dict(
    section.split("\n", 1) for section in RECIPES.read_text().split("\n## ")[1:]
)
"""The recipes by their headings."""

_CODE = re.compile(
    r"^```\w*\n(?P<fenced>.*?)^```|^\n(?P<indented>(?: {4}.*\n)+)",
    re.MULTILINE | re.DOTALL,
)


def commands_of(text: str) -> Iterator[str]:
    """Yield the `vllm serve` commands of a page's code, each on one line."""
    for code in _CODE.finditer(text):
        lines = (code["fenced"] or code["indented"] or "").replace("\\\n", " ")
        for line in lines.splitlines():
            if re.match(r"\s*(\$ )?vllm serve ", line):
                yield line.strip().removeprefix("$ ")


COMMANDS = [
    pytest.param(command, id=f"{page.name}, {number}")
    for page in PAGES
    for number, command in enumerate(commands_of(page.read_text()))
]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    vllm = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(vllm.add_subparsers(dest="subparser"))
    return vllm


@pytest.mark.parametrize("command", COMMANDS)
def test_vllm_and_roco_take_a_command(
    command: str, parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    """The model's name stands for a tiny one, whose context is as long as it likes."""
    arguments = parser.parse_args(shlex.split(command, comments=True)[1:])
    ServeSubcommand().validate(arguments)
    assert arguments.model_tag
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    arguments.model = arguments.model_tag = str(tmp_path)
    arguments.skip_tokenizer_init = True
    # it wants the tokenizer of the real model
    arguments.reasoning_parser = ""
    engine = AsyncEngineArgs.from_cli_args(arguments)
    assert engine.additional_config["roco"].keys()
    validated_config(engine.create_engine_config())


def test_the_dashboards_command_evicts() -> None:
    """With vLLM's own lengths its panels stayed at 0."""
    page = (ROOT / "docs" / "dashboard.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^python -m tools.dashboard .*? -- (.*)$", page, re.M)
    words = shlex.split(command)
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = parser.parse_args(words[3:])
    assert words[:3] == ["vllm", "bench", "serve"]
    prompt = arguments.prefix_repetition_prefix_len
    prompt += arguments.prefix_repetition_suffix_len
    options = arguments.extra_body["vllm_xargs"]
    for extra_args in (None, options):
        row = RequestPlanner(RocoConfig(), 16).plan(extra_args, prompt).row
        assert row.schedule(16).evicted_blocks(prompt) > 0


def test_commands_of_every_page_are_found() -> None:
    assert len([*commands_of((ROOT / "README.md").read_text())]) == 1
    assert all([*commands_of(section)] for section in SECTIONS.values())


# with windows the start-up line tells more, and an adapter changes no bound
@pytest.mark.parametrize(
    "heading", sorted(SECTIONS.keys() - {"Gemma", "gpt-oss", "A LoRA"})
)
def test_a_recipe_tells_the_bounds_of_its_commands(heading: str) -> None:
    """In the words of the start-up line, and with asynchronous scheduling."""
    section = SECTIONS[heading]
    said = re.findall(
        r"attends over at most (\d+) tokens after a step "
        r"and holds at most (\d+) tokens of KV cache",
        " ".join(section.split()),
    )
    bounds = []
    for command in commands_of(section):
        words = shlex.split(command)
        options = json.loads(words[words.index("--additional-config") + 1])["roco"]
        config = RocoConfig(**options)
        assert config.most_kept is not None
        schedule = EvictionSchedule(16, config.most_kept, config.stride)
        held = schedule.max_blocks(2 * config.chunk) * schedule.block_size
        bounds.append((str(schedule.max_live_tokens()), str(held)))
    assert said == bounds
