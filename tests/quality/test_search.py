# SPDX-License-Identifier: Apache-2.0
"""The search for policies: what is compared, with what, and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.quality import scoring, with_oracle, worker
from benchmarks.quality.cells import PERPLEXITY, Cell
from benchmarks.quality.grid import cells
from benchmarks.quality.oracle import EvictionMethod, Oracle
from benchmarks.quality.policies import BASE, POLICIES, setup
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.results import Result
from benchmarks.quality.significance import compare
from benchmarks.quality.with_oracle import method_of
from tests.quality.tiny_model import prompts, save_tiny_model
from vllm_roco.config import RocoConfig
from vllm_roco.eviction_row import NEIGHBOUR_SHARE

METHOD = {name: method_of(setup(name, 256)) for name in POLICIES}
DEFAULT = EvictionMethod.named("roco", 256)


def test_the_base_is_known_by_its_name() -> None:
    rule = METHOD[BASE].rule
    assert f"base: {rule.shield}, {rule.shield_ratio}" == BASE
    assert rule.neighbours == 0


def test_the_plugins_default_is_among_the_changes() -> None:
    (name,) = (name for name, method in METHOD.items() if method == DEFAULT)
    assert name == "shield=contribution, shield_ratio=1.0, neighbours=0.75"
    for name in ("shield", "shield_ratio", "sink", "recent"):
        assert getattr(DEFAULT.rule, name) == getattr(RocoConfig, name)
    assert DEFAULT.rule.neighbours == NEIGHBOUR_SHARE


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_fits_every_cell_and_changes_something(name: str) -> None:
    every = cells(PRESETS["confirm"], model="m", seed=1, n=None)
    budgets = {cell.setup.budget for cell in every}
    assert budgets == {256, 512, 1024}
    methods = [method_of(setup(name, budget)) for budget in budgets]
    plain = [method_of(setup(BASE, budget)) for budget in budgets]
    assert (methods == plain) == (name == BASE)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_its_budget(name: str, tiny_oracle: Oracle) -> None:
    lengths = (520, 390)
    kept = tiny_oracle.kept(prompts(lengths), METHOD[name])
    for length, positions in zip(lengths, kept, strict=True):
        assert positions.shape[-1] == length - METHOD[name].evicted_tokens(length)
        assert (positions.diff(dim=-1) > 0).all()


def test_policies_are_known_by_their_changes() -> None:
    recent = setup("recent=25.0% of the budget", 512)
    assert method_of(recent).rule.recent == 128
    assert METHOD["fade=0.999"].rule.fade == 0.999
    cell = Cell(task="passkey", context=1, n=1, seed=1, model="m", setup=recent)
    assert Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell


@pytest.mark.usefixtures("one_thread")
def test_policies_are_compared_on_the_same_problems(
    smollm2: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(tmp_path)
    save_tiny_model(tmp_path, len(tokenizer))
    every = [
        Cell(
            task=task, context=256, n=2, seed=1_000, model="tiny", setup=setup(name, 64)
        )
        for name in ("full", BASE)
        for task in ("passkey", PERPLEXITY)
    ]
    engine = with_oracle.Engine(str(tmp_path), every)
    results = {
        cell: Result(
            cell, worker.measure(engine, tokenizer, str(tmp_path), cell), "CPU", "abc"
        )
        for cell in every
    }
    found = scoring.search_rows(results)
    assert found["method"].tolist() == ["full", "full", BASE, BASE]
    assert found["budget_ratio"].tolist() == [0.25] * 4
    assert found["score"][0] == 0, "a random model finds nothing"
    assert found["score"][1] > len(tokenizer) / 10
    assert found["better"][0] == found["better"][2] == 0
    assert found["better"][1] + found["worse"][1] == 2
    assert found["p_value"][3] == 1


def test_comparisons_are_paired() -> None:
    # 2 (C(6, 0) + C(6, 1)) / 2^6
    mcnemar = compare("accuracy", [1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1])
    assert mcnemar == (5, 1, pytest.approx(14 / 64))
    wilcoxon = compare("perplexity", [1.0, 2.0, 3.0, 4.0], [1.1, 2.2, 3.3, 4.4])
    assert wilcoxon == (4, 0, pytest.approx(2 / 16))
    assert compare("perplexity", [1.0], [1.0]) == (0, 0, 1)
