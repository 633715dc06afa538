# SPDX-License-Identifier: Apache-2.0
"""Engines of the quality benchmarks say the same where nothing is evicted."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from benchmarks.quality import with_kvpress, with_oracle
from benchmarks.quality.cells import Cell
from benchmarks.quality.policies import setup
from benchmarks.quality.tasks import Question
from tests.quality.tiny_model import prompts


@pytest.mark.usefixtures("one_thread")
def test_a_press_of_nothing_answers_as_the_oracle_with_its_full_cache(
    tiny_folder: Path, tiny_model: PreTrainedModel
) -> None:
    full = setup("full", 64)
    cell = Cell(task="needle", context=70, n=3, seed=1, model="tiny", setup=full)
    texts = [list(ids) for ids in prompts((70, 33, 5))]
    pressed, oracle = (
        engine(str(tiny_folder), [cell]).answers(cell, texts, 12)
        for engine in (with_kvpress.Engine, with_oracle.Engine)
    )
    # the oracle ends with the model's end token
    assert [ids[: len(end)] for ids, end in zip(pressed, oracle, strict=True)] == oracle


@pytest.mark.usefixtures("one_thread")
def test_requests_with_all_that_was_said_are_a_conversation(
    tiny_folder: Path, tiny_model: PreTrainedModel
) -> None:
    full = setup("full", 64)
    cell = Cell(task="needle", context=70, n=3, seed=1, model="tiny", setup=full)
    asked = [
        [Question(list(ids), 6, ("a",)), Question([5, 6, 7], 9, (), to_the_end=True)]
        for ids in prompts((70, 33, 5))
    ]
    kept, anew = (
        engine(str(tiny_folder), [cell]).converse(cell, asked)
        for engine in (with_oracle.Engine, with_kvpress.Engine)
    )
    assert kept == anew
    assert {tuple(map(len, answers)) for answers in kept} == {(6, 9)}
