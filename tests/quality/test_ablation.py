# SPDX-License-Identifier: Apache-2.0
"""The ablation: candidates, comparisons, and a table that is gone on with."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.quality.ablation import (
    CONFIRM_CELLS,
    Cell,
    Judge,
    Phase,
    Setting,
    Table,
    run,
    summarise,
)
from benchmarks.quality.ablation_report import ablation_table
from benchmarks.quality.candidates import CANDIDATES, DEFAULT
from benchmarks.quality.cells import PERPLEXITY
from benchmarks.quality.oracle import Keep, Oracle
from benchmarks.quality.oracle.rule import rule_of
from benchmarks.quality.paired import compare_answers, compare_nats
from tests.quality.tiny_model import prompts, save_tiny_model
from vllm_roco.config import RocoConfig

PHASE = Phase("trial", (Cell("passkey", 256, 0.5), Cell(PERPLEXITY, 128, 0.5)), 2, 1)


def test_the_default_is_the_plugins() -> None:
    keep, config = CANDIDATES[DEFAULT].keep(256), RocoConfig()
    assert keep.method == config.policy
    for name in ("shield", "shield_ratio", "sink", "recent"):
        assert getattr(keep, name) == getattr(config, name)


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_fits_every_cell_and_changes_something(name: str) -> None:
    budgets = {int(cell.budget_ratio * cell.context) for cell in CONFIRM_CELLS}
    keeps = [CANDIDATES[name].keep(budget) for budget in budgets]
    for keep in keeps:
        assert keep.method == "full" or rule_of(keep)
    plain = [Keep("roco", budget) for budget in budgets]
    assert (keeps == plain) == (name == DEFAULT)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_keeps_its_budget(name: str, tiny_oracle: Oracle) -> None:
    keep = CANDIDATES[name].keep(256)
    lengths = (520, 390)
    kept = tiny_oracle.kept(prompts(lengths), keep)
    for length, positions in zip(lengths, kept, strict=True):
        assert positions.shape[-1] == length - keep.evicted_tokens(length)
        assert (positions.diff(dim=-1) > 0).all()


def test_candidates_are_known_by_their_name() -> None:
    assert CANDIDATES["recent=25.0% of the budget"].keep(512).recent == 128
    assert CANDIDATES["fade=0.999"].keep(512).options == (("fade", 0.999),)


@pytest.mark.usefixtures("one_thread")
def test_a_table_is_gone_on_with(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(tmp_path)
    save_tiny_model(tmp_path, len(tokenizer))
    judge = Judge(str(tmp_path), "cpu", torch.float32)
    settings = [
        Setting(PHASE, "tiny", "float32", CANDIDATES[name], cell)
        for name in ("full", DEFAULT)
        for cell in PHASE.cells
    ]
    table = Table(tmp_path / "ablation.csv")
    run(judge, table, settings, deadline=time.monotonic())
    assert table.rows() == []
    run(judge, table, settings, deadline=math.inf)
    rows = table.rows()
    run(judge, table, settings, deadline=math.inf)
    assert table.rows() == rows
    assert [(row["candidate"], row["task"]) for row in rows] == [
        ("full", "passkey"),
        ("full", PERPLEXITY),
        (DEFAULT, "passkey"),
        (DEFAULT, PERPLEXITY),
    ]
    assert rows[0]["values"] == "0 0", "a random model finds nothing"
    assert float(rows[1]["score"]) > len(tokenizer) / 10

    compared = summarise(rows)
    assert compared[0]["better"] == compared[2]["better"] == 0
    assert compared[3]["p_value"] == "1"


def test_comparisons_are_paired() -> None:
    mcnemar = compare_answers([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1])
    assert (mcnemar.better, mcnemar.worse) == (5, 1)
    # 2 (C(6, 0) + C(6, 1)) / 2^6
    assert mcnemar.p_value == pytest.approx(14 / 64)
    wilcoxon = compare_nats([1.0, 2.0, 3.0, 4.0], [1.1, 2.2, 3.3, 4.4])
    assert (wilcoxon.better, wilcoxon.worse) == (4, 0)
    assert wilcoxon.p_value == pytest.approx(2 / 16)
    assert compare_nats([1.0], [1.0]).p_value == 1


def test_the_report_tells_what_differs_and_what_is_missing() -> None:
    def row(candidate: str, ratio: str, score: str, p_value: str) -> dict[str, str]:
        return {
            "phase": "screen",
            "dtype": "bfloat16",
            "n": "64",
            "seed": "1000",
            "task": "needle",
            "context": "1024",
            "budget_ratio": ratio,
            "candidate": candidate,
            "score": score,
            "p_value": p_value,
        }

    text = ablation_table(
        [
            row("default", "0.25", "0.8", "1"),
            row("default", "0.5", "0.9", "1"),
            row("worse", "0.25", "0.2", "0.001"),
            row("worse", "0.5", "0.85", "0.5"),
            row("better", "0.25", "0.9", "0.04"),
            row("better", "0.5", "0.91", "0.9"),
            row("cut short", "0.5", "1", "0.001"),
        ]
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].endswith("1 more were not measured in every cell")
    assert lines[2] == "| change | needle 1,024, 50 % | needle 1,024, 25 % |"
    assert lines[4:] == [
        "| `better` | 0.91 | 0.90* |",
        "| **default** | 0.90 | 0.80 |",
        "| `worse` | 0.85 | 0.20* |",
    ]
