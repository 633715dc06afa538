# SPDX-License-Identifier: Apache-2.0
"""Conversations that a needle is told in, and how their answers are counted."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks import rows
from benchmarks.quality.tasks import Problem, build
from benchmarks.quality.tasks.told_in_turns import (
    ANSWER_START,
    WORDS,
    build_told_in_turns,
)
from benchmarks.quality.turns import (
    BUDGETS,
    CONTEXTS,
    SEED,
    TABLE,
    TEXTS,
    counted,
    sides,
)
from vllm_roco.answers import Answers, turn_lengths
from vllm_roco.chunking import TURNS_PER_CHUNK, ChunkEnds
from vllm_roco.config import RocoConfig

CONTEXT = 2048


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def end(smollm2: Path) -> int:
    """The token that the plugin takes for a turn's end."""
    return int(json.loads((smollm2 / "config.json").read_text())["eos_token_id"])


@pytest.fixture(scope="module")
def told(tokenizer: Any) -> list[Problem]:
    return build_told_in_turns(tokenizer, CONTEXT, 8, SEED)


def test_every_message_but_the_answer_ends_with_the_models_end_token(
    tokenizer: Any, told: list[Problem], end: int
) -> None:
    for problem in told:
        ids = problem.token_ids
        messages = tokenizer.decode(ids).split("<|im_start|>")[1:]
        after = [ids[place + 1] for place, token in enumerate(ids) if token == end]
        assert len(after) == len(messages) - 1 >= 8
        assert set(tokenizer.convert_ids_to_tokens(after)) == {"Ċ"}
        assert all(text.endswith("<|im_end|>\n") for text in messages[:-1])
        assert re.fullmatch(
            r"assistant\nThe special magic number for [\w ]+ mentioned in the "
            r"provided text is",
            messages[-1],
        )


def test_the_needle_is_told_once_and_whole_in_one_turn(
    tokenizer: Any, told: list[Problem]
) -> None:
    assert len({problem.answers for problem in told}) == len(told)
    for problem in told:
        (number,) = problem.answers
        text = tokenizer.decode(problem.token_ids)
        assert text.count(number) == 1
        needle = rf"One of the special magic numbers for [\w ]+ is: {number}\."
        assert re.search(needle, text)


def test_all_of_the_prose_is_told_in_turns_of_a_length(
    tokenizer: Any, told: list[Problem]
) -> None:
    bare = build("needle", tokenizer, CONTEXT, len(told), SEED)
    for problem, source in zip(told, bare, strict=True):
        text = tokenizer.decode(problem.token_ids)
        parts = re.findall(r"Remember this: (.*)<\|im_end\|>", text)
        prose = tokenizer.decode(source.token_ids).split("\n")[1:-1]
        assert " ".join(parts) == " ".join(prose)
        assert all(WORDS <= len(part.split(" ")) <= 2 * WORDS for part in parts[:-1])


def test_conversations_are_the_same_for_a_seed(
    tokenizer: Any, told: list[Problem]
) -> None:
    assert told == build_told_in_turns(tokenizer, CONTEXT, 8, SEED)
    assert told != build_told_in_turns(tokenizer, CONTEXT, 8, SEED + 1)


def test_the_kept_rows_are_of_these_conversations(tokenizer: Any) -> None:
    """As many tokens as were measured."""
    problems = build_told_in_turns(tokenizer, CONTEXT, TEXTS, SEED)
    assert sum(len(problem.token_ids) for problem in problems) == 422_838


def test_the_assistant_tells_the_same_in_its_answers(
    tokenizer: Any, told: list[Problem], end: int
) -> None:
    start = tokenizer(ANSWER_START, add_special_tokens=False)["input_ids"]
    for problem, other in zip(
        build_told_in_turns(tokenizer, CONTEXT, 8, SEED, "assistant"), told, strict=True
    ):
        ids = np.array(problem.token_ids)
        answers = Answers.of(ids, start, turn_lengths(ids, [end]))
        parts = [
            tokenizer.decode(ids[begin : until - 1])
            for begin, until in zip(answers.starts, answers.written_ends, strict=False)
        ]
        text = tokenizer.decode(other.token_ids)
        assert parts == re.findall(r"Remember this: (.*)<\|im_end\|>", text)
        assert answers.is_open
        assert answers.starts[-1] < len(ids)


@pytest.mark.parametrize("budget", BUDGETS)
def test_turns_end_chunks_that_would_be_longer(
    told: list[Problem], end: int, budget: int
) -> None:
    """Else both sides would read alike."""
    chunk = RocoConfig(budget=budget).chunk
    for problem in told:
        ids = problem.token_ids
        ends = ChunkEnds.of(ids, [end], chunk, chunk // TURNS_PER_CHUNK, 16)
        usual = ChunkEnds(chunk).between(0, len(ids))
        assert len(ends.between(0, len(ids))) > len(usual)


def test_a_tokenizer_without_the_end_of_a_turn_is_refused() -> None:
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ValueError, match=r"makes 3 tokens of '<\|im_end\|>'"):
        build_told_in_turns(tokenizer, CONTEXT, 1, SEED)


def test_a_side_differs_from_the_default_in_what_it_names_alone() -> None:
    full, *others = (side for side, _ in sides(BUDGETS))
    assert "additional_config" not in full.engine_arguments(CONTEXT, [1, 2])
    found = []
    for side in others:
        arguments = side.engine_arguments(CONTEXT, [1, 2])
        assert arguments["attention_backend"] == "roco"
        config = RocoConfig(**arguments["additional_config"]["roco"])
        default = asdict(RocoConfig(budget=side.budget))
        found.append({k: v for k, v in asdict(config).items() if v != default[k]})
    answers, ends = {"answer_start_token_ids": ()}, {"turn_end_token_ids": ()}
    written = {"answer_start_token_ids": (1, 2)}
    again = [answers, answers | ends, answers | ends | {"chunk": 256}]
    assert found == [written, *again, *again]


def test_the_kept_rows_are_every_side_with_its_interval() -> None:
    kept = TABLE.read(rows.RESULTS)
    names = ["budget", "stride", "chunk", "turn_end_token_ids", "answers"]
    names += ["teller", "context"]
    assert [tuple(row) for row in kept[names].itertuples(index=False)] == [
        (*vars(side).values(), teller, context)
        for side, tellers in sides(BUDGETS)
        for teller in tellers
        for context in CONTEXTS
    ]
    for row in kept.to_dict("records"):
        expected = counted(row["right"], row["n"])
        assert {name: row[name] for name in expected} == expected
    assert counted(9, 10) == {
        **{"right": 9, "score": 0.9},
        **{"ci_low": 0.5958, "ci_high": 0.9821},
    }
