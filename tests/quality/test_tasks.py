# SPDX-License-Identifier: Apache-2.0
"""Problems are as long as asked, the same for the same seed, and have one answer."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.quality.tasks import (
    CONVERSATIONS,
    FIRST_REPORT_SEED,
    TASKS,
    Problem,
    build,
    prose,
    tokens_behind,
)
from benchmarks.quality.tasks.recite import Recital
from benchmarks.quality.tasks.ruler import RULER_TASKS
from benchmarks.quality.training.samples import write

CONTEXT = 2048
# RULER's generators grow a text in steps, and leave room for the answer
MOST_UNUSED = {
    **{"passkey": 30, "needle": 300, "common_words": 200},
    **dict.fromkeys(RULER_TASKS, 600),
    # a third is read, and the rest written
    "recite": 2 * CONTEXT // 3 + 100,
}


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
        assert 0 <= unused < MOST_UNUSED.get(task, 120)


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


@pytest.mark.parametrize("task", CONVERSATIONS)
def test_every_question_has_its_answers_in_the_text(tokenizer: Any, task: str) -> None:
    for problem in build(task, tokenizer, CONTEXT, 4, FIRST_REPORT_SEED):
        prompt = tokenizer.decode(problem.token_ids)
        told = [answer for each in problem.questions for answer in each.answers]
        assert len(set(told)) == len(told) > 0
        assert all(answer in prompt for answer in told)
        behind = problem.max_tokens + sum(
            len(each.token_ids) + each.max_tokens for each in problem.later
        )
        # what an engine has beside it for the last answer
        assert behind <= tokens_behind(task) + 128


@pytest.mark.parametrize("task", ["needle", "multikey", "multivalue"])
def test_forms_of_a_task_ask_the_same_texts(tokenizer: Any, task: str) -> None:
    two, four, later = (
        build(f"{task}, {form}", tokenizer, CONTEXT, 3, FIRST_REPORT_SEED)
        for form in ("2 questions", "4 questions", "later")
    )
    for short, long, paused in zip(two, four, later, strict=True):
        assert short.token_ids == long.token_ids
        assert short.later == long.later[:1]
        assert len({each.answers for each in long.questions}) == 4
        first, question = paused.questions
        assert first.to_the_end and first.max_tokens == 1024 and not first.answers
        assert question.answers == long.answers
        text = tokenizer.decode(long.token_ids).rpartition("\n")[0]
        assert tokenizer.decode(first.token_ids).startswith(text)


@pytest.mark.parametrize(
    ("task", "ours", "context"),
    [
        ("niah_multikey_2", "multikey", 2048),
        ("vt", "variables", 2048),
        ("cwe", "common_words", 2048),
        ("cwe", "common_words", 4096),
    ],
)
def test_generated_problems_are_worded_as_rulers(
    tokenizer: Any, task: str, ours: str, context: int
) -> None:
    """An adapter that is trained on one is to understand the other."""
    (theirs,), (own,) = (
        build(name, tokenizer, context, 1, FIRST_REPORT_SEED) for name in (task, ours)
    )
    assert wording(tokenizer, theirs) == wording(tokenizer, own)
    assert len(theirs.answers) == len(own.answers)


def wording(tokenizer: Any, problem: Problem) -> tuple[str, ...]:
    """Return the first and the last line without keys and numbers."""
    lines = tokenizer.decode(problem.token_ids).splitlines()
    return tuple(re.sub(r"\w+-[\w-]+|\d+", "#", lines[i]) for i in (0, -1))


def test_common_words_are_the_most_common(tokenizer: Any) -> None:
    for context in (1024, 4096):
        (problem,) = build("common_words", tokenizer, context, 1, FIRST_REPORT_SEED)
        listed = tokenizer.decode(problem.token_ids).splitlines()[1]
        counts = Counter(re.findall(r"[a-z]+", listed)).most_common(11)
        assert {word for word, _ in counts[:10]} == set(problem.answers)
        assert counts[9][1] > counts[10][1]


def test_variables_of_a_chain_are_assigned_to_one_another(tokenizer: Any) -> None:
    (problem,) = build("variables", tokenizer, CONTEXT, 1, FIRST_REPORT_SEED)
    text = tokenizer.decode(problem.token_ids)
    (value,) = re.findall(r"value (\d+), they are:$", text)
    places = [text.index(f"VAR {problem.answers[0]} = {value}")]
    for last, name in pairwise(problem.answers):
        places.append(text.index(f"VAR {name} = VAR {last} "))
    assert len(problem.answers) == 5
    assert places == sorted(places)


class TestRecite:
    """Lines are judged by what the model wrote before."""

    problem = Recital([1], 99, ("a", "b", "c"))

    def test_all_right(self) -> None:
        text = "a: 3\nb: 9\nc: 4\nSums of sums:\na = 3\nb = 2\nc = 6"
        assert self.problem.score(text) == 1

    def test_one_mistake_counts_once(self) -> None:
        text = "a: 3\nb: 9\nc: 4\nSums of sums:\na = 4\nb = 3\nc = 7"
        assert self.problem.score(text) == pytest.approx(2 / 3)

    def test_a_wrong_first_sum_is_no_mistake_of_the_second(self) -> None:
        text = "a: 3\nb: 8\nc: 4\nSums of sums:\na = 3\nb = 1\nc = 5"
        assert self.problem.score(text) == 1

    @pytest.mark.parametrize(
        ("text", "score"),
        [
            ("", 0),
            ("a: 3\nb: 9\nc: 4\n", 0),
            ("a: 3\nb: 9\nc: 4\nSums of sums:\na = 3", 1 / 3),
            ("a: 3\nb: 9\nSums of sums:\na = 3\nb = 2\nc = 6", 2 / 3),
            ("a: 3\nx: 9\nc: 4\nSums of sums:\na = 3\nb = 2\nc = 6", 2 / 3),
            ("a: 3\nb: 9\nc: 4\nSums of sums:\na = 3\nstop\nc = 6", 1 / 3),
        ],
    )
    def test_what_is_missing_is_wrong(self, text: str, score: float) -> None:
        assert self.problem.score(text) == pytest.approx(score)

    def test_what_an_adapter_is_trained_to_write_is_right(self, tokenizer: Any) -> None:
        draw = random.Random(1)
        (exchange,) = write("recite", draw, "seed", tokenizer, 512)
        problem = Recital([1], 99, exchange.answers)
        assert problem.score(exchange.reply) == 1


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
