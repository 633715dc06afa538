# SPDX-License-Identifier: Apache-2.0
"""The plugin's policy in the oracle: against the tests' oracle and the plugin."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import benchmarks.quality.oracle
from benchmarks.quality.oracle import EvictionMethod, Oracle
from benchmarks.quality.oracle.eviction_method import RULES
from benchmarks.quality.oracle.selection import Due, choose_survivors
from benchmarks.quality.oracle.statistics import Statistics
from tests.oracle import Options, generate
from tests.quality.tiny_model import prompts
from tests.rows import row_of
from vllm_roco.config import RocoConfig
from vllm_roco.policy import select_victims

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBERS = {"budget": 24, "stride": 8, "chunk": 20, "sink": 3, "recent": 6}
BLOCK_SIZE = 4


@pytest.mark.parametrize(
    ("method", "shield", "ratio"),
    [
        ("roco", "contribution", 0.5),
        ("roco", "contribution", 1.0),
        ("roco", "peak", 0.5),
        ("roco", "peak", 1.0),
        ("roco", "deviation", 0.5),
        ("roco", "deviation", 0.0),
        ("recent", "peak", 0.5),
    ],
)
def test_equals_the_oracle_of_the_plugins_tests(
    method: str,
    shield: str,
    ratio: float,
    tiny_model: PreTrainedModel,
    tiny_oracle: Oracle,
) -> None:
    shields = {"shield": shield, "shield_ratio": ratio} if method == "roco" else {}
    if method == "roco" and shield != "contribution":
        shields["neighbours"] = 0.0
    eviction = EvictionMethod.named(method, **NUMBERS, unit=BLOCK_SIZE, **shields)
    options = Options(
        policy=method,
        **NUMBERS,
        block_size=BLOCK_SIZE,
        shield=shield,
        shield_ratio=ratio,
    )
    # evicts at the prompt's end, so that what lives then is what was kept
    lengths = (72, 64, 48)
    kept = tiny_oracle.kept(prompts(lengths), eviction)
    answers = tiny_oracle.generate(prompts(lengths), eviction, 30)
    for prompt, positions, answer in zip(prompts(lengths), kept, answers, strict=True):
        expected = generate(tiny_model, prompt, options, 30)
        at_end = [
            eviction.kept_blocks
            for eviction in expected.evictions
            if eviction.num_computed_tokens == len(prompt)
        ]
        assert positions.shape[:2] == (1, 1)
        assert positions[0, 0].tolist() == [
            position
            for block in at_end[0]
            for position in range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        ]
        assert answer == list(expected.token_ids)


@pytest.mark.parametrize("shield", ["contribution", "peak", "deviation"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_chooses_what_the_plugin_chooses(shield: str, ratio: float) -> None:
    """The same statistics, some of them equal, go through both."""
    sequences, layers, heads, blocks, block_size = 6, 3, 2, 14, 16
    budget, victims = 8 * block_size, 4
    generator = torch.Generator().manual_seed(int(ratio * 10))
    # few distinct values make ties
    mass = torch.randint(1, 4, (layers, sequences, heads, blocks), generator=generator)
    first = torch.stack(
        [
            torch.randperm(40, generator=generator)[:blocks].sort().values
            for _ in range(sequences)
        ]
    )
    first = first * block_size
    computed = (first.amax(-1) + block_size).tolist()

    neighbours = RULES["roco"].neighbours if shield == "contribution" else 0.0
    # few distinct ones, as with the masses
    distances = torch.randint(1, 3, mass.shape, generator=generator).float()
    rule = replace(
        RULES["roco"], shield=shield, shield_ratio=ratio, neighbours=neighbours
    )
    statistics = Statistics(
        rule, (layers, sequences, heads, blocks), torch.device("cpu")
    )
    count = (torch.tensor(computed)[:, None] - first)[None, :, None]
    total, squares, peak = mass * 1.5, mass.square() * 2.25, mass / 4
    statistics.fields[:, 0] = count
    statistics.fields[:, 1] = total
    statistics.fields[:, 2] = squares
    statistics.fields[:, 4] = peak
    due = Due(
        computed,
        [blocks * block_size] * sequences,
        [victims * block_size] * sequences,
        budget,
    )
    stay = choose_survivors(
        rule,
        due,
        first[None, :, None],
        statistics,
        seeds=[0] * sequences,
        further={"contribution": peak * distances},
    )

    config = RocoConfig(
        budget=budget,
        stride=victims * block_size,
        shield=shield,
        shield_ratio=ratio,
    )
    for i in range(sequences):
        queries = count[0, i].expand(layers, heads, -1)
        fields = (total[:, i], squares[:, i], peak[:, i], queries)
        expected = select_victims(
            torch.stack(fields, -1).float(),
            first[i].float(),
            computed[i],
            victims,
            block_size,
            row_of(config, block_size),
            distances[:, i],
        )
        assert (~stay[0, i, 0]).nonzero()[:, 0].tolist() == expected.tolist()


def test_the_oracle_shares_no_code_with_the_plugin() -> None:
    for file in Path(benchmarks.quality.oracle.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"vllm", "vllm_roco", "tests"}, file.name
