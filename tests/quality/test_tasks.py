# SPDX-License-Identifier: Apache-2.0
"""Problems are as long as asked, the same for the same seed, and have one answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.quality.tasks import FIRST_REPORT_SEED, TASKS, build, prose
from benchmarks.quality.tasks.ruler import RULER_TASKS

CONTEXT = 2048
# RULER's generators grow a text in steps, and leave room for the answer
MOST_UNUSED = {"passkey": 30, "needle": 300, **dict.fromkeys(RULER_TASKS, 600)}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.parametrize("task", TASKS)
def test_problems_are_deterministic_and_of_the_asked_length(
    tokenizer: Any, task: str
) -> None:
    problems = build(task, tokenizer, CONTEXT, 4, 7)

    assert problems == build(task, tokenizer, CONTEXT, 4, 7)
    assert problems != build(task, tokenizer, CONTEXT, 4, 8)
    assert len({tuple(problem.token_ids) for problem in problems}) == 4
    for problem in problems:
        unused = CONTEXT - len(problem.token_ids)
        assert 0 <= unused < MOST_UNUSED[task]


@pytest.mark.parametrize("task", ["needle", "niah_single_1"])
@pytest.mark.parametrize("seed", [7, FIRST_REPORT_SEED])
def test_the_needle_is_in_the_prompt_once(tokenizer: Any, task: str, seed: int) -> None:
    for problem in build(task, tokenizer, CONTEXT, 8, seed):
        (answer,) = problem.answers
        assert tokenizer.decode(problem.token_ids).count(answer) == 1


def test_the_passkey_is_told_twice_in_one_place(tokenizer: Any) -> None:
    for problem in build("passkey", tokenizer, CONTEXT, 4, 7):
        (key,) = problem.answers
        text = tokenizer.decode(problem.token_ids)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        assert text.count(needle) == 1
        assert text.count(key) == 2


def test_needles_are_spread_over_all_depths(tokenizer: Any) -> None:
    depths = []
    for problem in build("needle", tokenizer, CONTEXT, 10, 7):
        text = tokenizer.decode(problem.token_ids)
        depths.append(text.index(problem.answers[0]) / len(text))

    assert depths == pytest.approx([(i + 0.5) / 10 for i in range(10)], abs=0.12)


def test_score_is_the_share_of_answers_that_are_told(tokenizer: Any) -> None:
    (problem,) = build("vt", tokenizer, CONTEXT, 1, 7)
    first, second, *others = problem.answers

    assert problem.score(f" {first.lower()} and {second}") == pytest.approx(
        2 / (2 + len(others))
    )
    assert problem.score("nothing") == 0


def test_prose_is_exact_in_length_and_tuning_reads_another_novel(
    tokenizer: Any,
) -> None:
    tuning = prose(tokenizer, 256, 3, 7)
    report = prose(tokenizer, 256, 3, FIRST_REPORT_SEED)

    assert [len(passage) for passage in tuning + report] == [256] * 6
    assert tuning == prose(tokenizer, 256, 3, 7)
    windows = {
        tuple(passage[i : i + 24]) for passage in tuning for i in range(256 - 24)
    }
    assert not windows & {
        tuple(passage[i : i + 24]) for passage in report for i in range(256 - 24)
    }


def test_later_halves_of_a_hundred_passages_do_not_overlap(tokenizer: Any) -> None:
    """The loss is taken of them, so that every token counts once."""
    halves = [passage[1024:] for passage in prose(tokenizer, 2048, 100, 50_000)]
    novel = [token for half in halves for token in half]

    starts = {tuple(half[:16]) for half in halves}
    found = [i for i in range(len(novel) - 15) if tuple(novel[i : i + 16]) in starts]
    assert found == list(range(0, 100 * 1024, 1024))


@pytest.mark.parametrize(
    ("task", "context", "n", "message"),
    [
        ("riddle", CONTEXT, 1, "task = 'riddle' is not one of passkey, needle"),
        ("needle", 64, 1, "context = 64 leaves .* tokens for prose"),
        ("needle", 10**6, 1, "context = 1000000 leaves .* tokens for prose"),
        ("vt", 512, 1, "0 problems of task 'vt' at context 512, not 1"),
        ("vt", CONTEXT, 101, "100 problems of task 'vt' .*, not 101"),
    ],
)
def test_what_cannot_be_built_is_refused(
    tokenizer: Any, task: str, context: int, n: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(task, tokenizer, context, n, 7)
