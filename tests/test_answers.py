# SPDX-License-Identifier: Apache-2.0
"""Where earlier answers stand in a prompt, and where something went meanwhile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_roco.answers import Answers, turn_lengths
from vllm_roco.eviction_schedule import NEVER, EvictionSchedule

END, CUE, OTHER = 7, 8, 9


def answers_of(
    tokens: list[int], cue: tuple[int, ...] = (CUE,), ends: tuple[int, ...] = (END,)
) -> list[tuple[int, int]]:
    """Return where answers begin and end."""
    ids = np.array(tokens, dtype=np.int64)
    answers = Answers.of(ids, cue, turn_lengths(ids, ends))
    return [*zip(answers.starts, answers.ends, strict=True)]


def found_one_by_one(
    tokens: list[int], cue: tuple[int, ...], ends: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Return the same, found token by token."""
    answers = []
    begun = 0
    for length in range(1, len(tokens) + 1):
        if begun and tokens[length - 1] in ends:
            answers.append((begun, length))
            begun = 0
        # its last token may be one that ends the turn before
        if not begun and (*tokens[:length],)[-len(cue) :] == cue:
            begun = length
    return [*answers, (begun, NEVER)] if begun else answers


@pytest.mark.parametrize(
    ("tokens", "cue", "ends", "expected"),
    [
        pytest.param([1, END, 2], (CUE,), (END,), [], id="none"),
        pytest.param([1, CUE, 2, END, 3], (CUE,), (END,), [(2, 4)], id="one"),
        pytest.param([1, CUE, 2, 3], (CUE,), (END,), [(2, NEVER)], id="open"),
        pytest.param([1, 1, CUE], (CUE,), (END,), [(3, NEVER)], id="to be written"),
        pytest.param(
            [CUE, 2, END, 1, END, CUE, 2, 2, END, 1, CUE],
            (CUE,),
            (END,),
            [(1, 3), (6, 9), (11, NEVER)],
            id="several",
        ),
        pytest.param(
            [CUE, 2, CUE, 2, END, CUE],
            (CUE,),
            (END,),
            [(1, 5), (6, NEVER)],
            id="a marker within an answer",
        ),
        pytest.param(
            [CUE, 1, CUE, OTHER, 2, END, OTHER, CUE],
            (CUE, OTHER),
            (END,),
            [(4, 6)],
            id="a marker of several tokens",
        ),
        pytest.param([CUE, CUE, CUE, END], (CUE, CUE), (END,), [(2, 4)], id="overlap"),
        pytest.param([CUE, 2, 3], (CUE,), (), [(1, NEVER)], id="no end token"),
        pytest.param([CUE, END, CUE], (CUE,), (END,), [(1, 2), (3, NEVER)], id="empty"),
        pytest.param([CUE, END], (CUE,), (END,), [(1, 2)], id="the last token ends it"),
        pytest.param(
            [CUE, 2, OTHER, CUE, 2, END],
            (CUE,),
            (END, OTHER),
            [(1, 3), (4, 6)],
            id="several end tokens",
        ),
        pytest.param(
            [END, CUE, 2, END, CUE, END, END],
            (END, CUE),
            (END,),
            [(2, 4), (5, 6)],
            id="a marker that begins with what ends the turn before",
        ),
        pytest.param(
            [CUE, END, 2, END],
            (CUE, END),
            (END,),
            [(2, 4)],
            id="a marker does not end its own answer",
        ),
        pytest.param([CUE], (CUE, OTHER), (END,), [], id="shorter than a marker"),
        pytest.param([], (CUE,), (END,), [], id="no tokens"),
        pytest.param([CUE, END], (), (END,), [], id="no marker"),
    ],
)
def test_worked_examples(
    tokens: list[int],
    cue: tuple[int, ...],
    ends: tuple[int, ...],
    expected: list[tuple[int, int]],
) -> None:
    assert answers_of(tokens, cue, ends) == expected
    if cue:
        assert found_one_by_one(tokens, cue, ends) == expected


@pytest.mark.parametrize(
    ("tokens", "is_open", "written"),
    [
        ([1], False, []),
        ([CUE], True, []),
        ([CUE, 1, END, 1], False, [3]),
        ([CUE, 1, END, CUE, END, CUE, 1], True, [3, 5]),
    ],
    ids=repr,
)
def test_the_last_answer_may_be_open(
    tokens: list[int], is_open: bool, written: list[int]
) -> None:
    ids = np.array(tokens, dtype=np.int64)
    answers = Answers.of(ids, (CUE,), turn_lengths(ids, {END}))
    assert answers.is_open == is_open
    assert [*answers.written_ends] == written


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        pytest.param([1, 1, END, 2, 2, END, CUE], 3, id="behind a header"),
        pytest.param([1, END, 1, END, 2, END, CUE], 4, id="behind the last of two"),
        pytest.param([2, 2, END, CUE], 0, id="no header"),
        pytest.param([1, END, 2, 2, CUE], 0, id="nothing ends the question"),
        pytest.param([2, END, CUE, 3, END, 2, END, CUE], 5, id="behind an answer"),
        pytest.param([2, END, CUE, 3, CUE, 3], 0, id="a marker within an answer"),
        pytest.param([1, 1], 0, id="nothing is asked"),
    ],
)
def test_the_last_question_stands_behind_the_turn_before(
    tokens: list[int], expected: int
) -> None:
    ids = np.array(tokens, dtype=np.int64)
    answers = Answers.of(ids, (CUE,), turn_lengths(ids, {END}))
    assert answers.question_start == expected


texts = st.lists(st.sampled_from([1, 2, END, CUE, OTHER]), max_size=60)
cues = st.sampled_from([(CUE,), (CUE, OTHER), (CUE, CUE), (END, CUE)])
end_tokens = st.sampled_from([(), (END,), (END, OTHER)])


@given(texts, cues, end_tokens)
def test_answers_are_those_found_token_by_token(
    tokens: list[int], cue: tuple[int, ...], ends: tuple[int, ...]
) -> None:
    assert answers_of(tokens, cue, ends) == found_one_by_one(tokens, cue, ends)


@given(texts, texts, cues, end_tokens)
def test_a_prompt_that_goes_on_has_the_same_answers(
    prompt: list[int], more: list[int], cue: tuple[int, ...], ends: tuple[int, ...]
) -> None:
    """But for the end of the last one, if that comes later."""
    longer = answers_of([*prompt, *more], cue, ends)
    shared = [(a, b if b <= len(prompt) else NEVER) for a, b in longer]
    along = [(start, end) for start, end in shared if start <= len(prompt)]
    assert answers_of(prompt, cue, ends) == along


schedules = st.builds(
    lambda size, budget, stride, until: EvictionSchedule(
        size, budget * size, stride * size, until
    ),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.one_of(st.just(NEVER), st.integers(0, 70)),
)


def answers_between(lengths: list[int]) -> Answers:
    """Return answers that begin and end in turn, of which the last may be open."""
    ends = lengths[1::2] if len(lengths) % 2 == 0 else [*lengths[1::2], NEVER]
    return Answers(tuple(lengths[::2]), tuple(ends))


answers_anywhere = st.sets(st.integers(1, 60), max_size=9).map(sorted)


@given(answers_anywhere.map(answers_between), schedules)
def test_something_went_where_e_grew_token_by_token(
    answers: Answers, schedule: EvictionSchedule
) -> None:
    """At an answer's tokens, or where it begins for what its prompt had grown by."""
    looked_at = [
        length
        for length in range(100)
        if any(
            start <= length <= end
            for start, end in zip(answers.starts, answers.ends, strict=True)
        )
    ]
    for length in range(64):
        gone = schedule.evicted_blocks(length)
        expected = next(
            (
                later
                for later in looked_at
                if later > length and schedule.evicted_blocks(later) > gone
            ),
            NEVER,
        )
        assert answers.next_eviction(length, schedule) == expected


def test_the_next_eviction_of_worked_examples() -> None:
    # E grows at 12, 16, 20 and so on
    schedule = EvictionSchedule(block_size=4, budget=8, stride=4)
    answers = Answers((14, 30), (20, NEVER))
    stops = [0]
    while stops[-1] < 40:
        stops.append(answers.next_eviction(stops[-1], schedule))
    assert stops == [0, 14, 16, 20, 30, 32, 36, 40]
    assert Answers((14,), (20,)).next_eviction(20, schedule) == NEVER
    assert Answers().next_eviction(0, schedule) == NEVER
    short = EvictionSchedule(block_size=4, budget=8, stride=4, until=17)
    assert answers.next_eviction(16, short) == NEVER
