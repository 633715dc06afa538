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
from benchmarks.quality.tasks.derivation import Derivation, Step, to_derivation
from benchmarks.quality.tasks.ruler import RULER_TASKS
from benchmarks.quality.training.samples import write

CONTEXT = 2048
# RULER's generators grow a text in steps, and leave room for the answer
MOST_UNUSED = {
    **{"passkey": 30, "needle": 300, "common_words": 200},
    **dict.fromkeys(RULER_TASKS, 600),
    # a fifth is read, and the rest written
    "derivation": 4 * CONTEXT // 5 + 100,
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


class TestDerivation:
    """Steps are judged by the values that the model wrote."""

    steps = (Step("zero", 3, "a"), Step("a", 8, "b"), Step("a", 1, "c"))
    problem = Derivation([1], 99, ("a", "b", "c"), steps=steps)
    first = (
        "1. zero + 3 = a: we know that zero is 0, and 0 + 3 makes 3, so from now on a "
        "is 3."
    )
    second = (
        "2. a + 8 = b: we know that a is 3, and 3 + 8 makes 1, so from now on b is 1."
    )
    third = (
        "3. a + 1 = c: we know that a is 3, and 3 + 1 makes 4, so from now on c is 4."
    )

    def score(self, *lines: str) -> float:
        return self.problem.score("\n".join(lines)) * len(self.steps)

    def test_all_right(self) -> None:
        assert self.score(self.first, self.second, self.third) == 3

    def test_a_line_that_is_missing_is_missing_once_if_nothing_needs_it(self) -> None:
        assert self.score(self.first, self.third) == 2
        assert self.score(self.second, self.third) == 0
        assert self.score("Well.", self.first, "", self.third) == 2
        assert self.score() == 0

    def test_a_mistake_is_none_of_those_that_follow_from_it(self) -> None:
        slip = self.first.replace("3 makes 3", "3 makes 5").replace("a is 3", "a is 5")
        second = self.second.replace(
            "a is 3, and 3 + 8 makes 1", "a is 5, and 5 + 8 makes 3"
        )
        assert self.score(slip, second.replace("b is 1", "b is 3")) == 1
        assert self.score(slip, self.second) == 0

    @pytest.mark.parametrize(
        ("right", "wrong"),
        [
            ("know that a is 3", "know that a is 4"),
            ("know that a is", "know that b is"),
            ("b is 1", "b is 2"),
            ("on b is", "on c is"),
            ("a + 8", "a + 7"),
            ("2. a", "9. a"),
        ],
    )
    def test_what_differs_is_wrong(self, right: str, wrong: str) -> None:
        assert right in self.second
        assert self.score(self.first, self.second.replace(right, wrong, 1)) == 1

    @pytest.mark.parametrize("context", [1024, 3072, 6144])
    def test_what_an_adapter_is_trained_to_write_is_right_and_has_room(
        self, tokenizer: Any, context: int
    ) -> None:
        for seed in range(3):
            exchanges = write(
                "derivation", random.Random(seed), f"{seed}", tokenizer, context
            )
            (exchange,) = exchanges
            problem = to_derivation(exchange, tokenizer)
            assert problem.score(exchange.reply) == 1
            assert problem.score(exchange.reply.rpartition("\n")[0]) < 1
            written = len(tokenizer(exchange.reply)["input_ids"])
            assert 0.6 * problem.max_tokens < written < problem.max_tokens
            assert len(problem.token_ids) + problem.max_tokens <= context

    def test_any_earlier_value_is_as_likely_to_be_needed(self, tokenizer: Any) -> None:
        back = []
        for problem in build("derivation", tokenizer, 3072, 8, 7):
            assert isinstance(problem, Derivation)
            names = ["zero", *(step.name for step in problem.steps)]
            for place, step in enumerate(problem.steps):
                back.append((place - names.index(step.operand)) / (place + 1))
        assert sum(share > 0.5 for share in back) / len(back) > 0.4


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
