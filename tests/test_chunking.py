# SPDX-License-Identifier: Apache-2.0
"""Where steps end: alone decisive for what a sequence keeps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_roco.answers import Answers, turn_lengths
from vllm_roco.chunking import ChunkEnds, next_step_ends
from vllm_roco.eviction_schedule import NEVER, EvictionSchedule

SCHEDULE = EvictionSchedule(block_size=16, budget=64, stride=32)

shapes = st.builds(
    lambda block_size, budget, stride, chunk: (
        EvictionSchedule(
            block_size=block_size,
            budget=budget * block_size,
            stride=stride * block_size,
        ),
        chunk * block_size,
    ),
    st.sampled_from([1, 4, 16]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 8),
)


def read(
    prompt: int,
    known: int,
    chunks: ChunkEnds,
    schedule: EvictionSchedule,
    room: Callable[[int, int], int] = max,
) -> list[int]:
    """Return the lengths at which the steps end that read all known tokens.

    Args:
        prompt: Tokens of the prompt.
        known: All known tokens.
        chunks: Where those of the prompt end.
        schedule: The eviction arithmetic.
        room: Chooses between the least and the greatest end of a step.
    """
    ends = [0]
    while ends[-1] < known:
        ends.append(room(*next_step_ends(ends[-1], prompt, known, chunks, schedule)))
    return ends


def evictions(ends: list[int], schedule: EvictionSchedule) -> list[tuple[int, int]]:
    """Return the lengths at which blocks go, and how many are gone by then."""
    steps = [(after, schedule.evicted_blocks(after)) for after in ends[1:]]
    before = [0] + [evicted for _, evicted in steps]
    return [step for step, gone in zip(steps, before, strict=False) if step[1] > gone]


@pytest.mark.parametrize(
    ("computed", "prompt", "known", "chunk", "end"),
    [
        pytest.param(0, 300, 300, 128, 128, id="first chunk"),
        pytest.param(128, 300, 300, 128, 256, id="middle chunk"),
        pytest.param(256, 300, 300, 128, 300, id="end of the prompt"),
        pytest.param(0, 128, 128, 128, 128, id="one exact chunk"),
        pytest.param(100, 300, 300, 128, 128, id="back to a multiple"),
        pytest.param(80, 300, 300, 16, 96, id="the first eviction, in a whole chunk"),
        pytest.param(256, 300, 330, 128, 300, id="resumed: the prompt ends as before"),
        pytest.param(300, 300, 330, 128, 320, id="resumed: E grows at 320"),
        pytest.param(320, 300, 330, 128, 330, id="resumed: the last token"),
        pytest.param(320, 300, 900, 16, 336, id="resumed: chunk before E grows"),
        pytest.param(340, 300, 900, 128, 352, id="resumed: E grows before the chunk"),
    ],
)
def test_worked_examples(
    computed: int, prompt: int, known: int, chunk: int, end: int
) -> None:
    ends = next_step_ends(computed, prompt, known, ChunkEnds(chunk), SCHEDULE)
    assert ends == (end, end)


@pytest.mark.parametrize(
    ("computed", "prompt", "known", "chunk", "least", "most"),
    [
        pytest.param(0, 300, 300, 16, 16, 80, id="up to the chunk that evicts first"),
        pytest.param(30, 300, 300, 16, 32, 80, id="the rest of it"),
        pytest.param(0, 40, 40, 128, 40, 40, id="a short prompt"),
        pytest.param(0, 95, 95, 16, 16, 95, id="a prompt that just evicts nothing"),
        pytest.param(0, 90, 300, 16, 16, 95, id="resumed: what was generated, too"),
        pytest.param(90, 90, 300, 16, 95, 95, id="resumed: no further than that"),
    ],
)
def test_while_nothing_is_evicted_a_step_may_end_later(
    computed: int, prompt: int, known: int, chunk: int, least: int, most: int
) -> None:
    ends = next_step_ends(computed, prompt, known, ChunkEnds(chunk), SCHEDULE)
    assert ends == (least, most)


SIZE, CHUNK, LEAST, END = 4, 32, 8, 7


def text_with_turns(length: int, *turns: int) -> list[int]:
    """Return tokens of which those before these lengths end a turn."""
    return [END if place + 1 in turns else 1 for place in range(length)]


def ends_of(tokens: list[int], chunk: int = CHUNK) -> list[int]:
    ends = ChunkEnds.of(np.array(tokens), {END}, chunk, LEAST, SIZE)
    return [*ends.between(0, len(tokens))]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        pytest.param((), [32, 64, 96], id="no turns"),
        pytest.param((20,), [20, 52, 84], id="multiples count from a turn's end"),
        pytest.param((23,), [20, 52, 84], id="up to the last full block"),
        pytest.param((7,), [32, 64, 96], id="too short a chunk"),
        pytest.param((8, 12, 16), [8, 16, 48, 80], id="not each of many"),
        pytest.param((32,), [32, 64, 96], id="where a chunk ends anyhow"),
        pytest.param((70,), [32, 64, 96], id="too near to a chunk's end"),
        pytest.param((75,), [32, 64, 72], id="within a later chunk"),
        pytest.param((20, 99), [20, 52, 84, 96], id="the last token's block"),
    ],
)
def test_chunks_end_where_turns_do(turns: tuple[int, ...], expected: list[int]) -> None:
    assert ends_of(text_with_turns(100, *turns)) == expected


def test_small_chunks_end_at_multiples_alone() -> None:
    """There is little behind them that a next turn would read again."""
    text = text_with_turns(40, 10, 21, 35)
    assert ends_of(text, chunk=LEAST) == [8, 16, 24, 32, 40]


texts = st.lists(st.sampled_from([1, 2, 3, END]), min_size=1, max_size=300)


@given(texts, st.lists(st.sampled_from([1, END]), max_size=100), st.integers(1, 9))
def test_a_prompt_that_goes_on_has_the_same_ends(
    prompt: list[int], more: list[int], blocks: int
) -> None:
    """But for one that a turn's end behind the prompt makes of its last full block."""
    chunk = blocks * SIZE
    ends, longer = ends_of(prompt, chunk), ends_of([*prompt, *more], chunk)
    shared = [end for end in longer if end + SIZE <= len(prompt)]
    assert ends[: len(shared)] == shared
    assert all(end + SIZE > len(prompt) for end in ends[len(shared) :])
    # nothing is lost: where the first prompt ends in a turn's end, the longer one does
    turns = [end for end in ends if END in prompt[end - 1 : end + SIZE - 1]]
    assert set(turns) <= set(longer)


@given(texts, st.integers(1, 9))
def test_chunks_of_turns_are_neither_too_long_nor_too_short(
    prompt: list[int], blocks: int
) -> None:
    chunk = blocks * SIZE
    for before, after in pairwise([0, *ends_of(prompt, chunk)]):
        assert min(chunk, LEAST) <= after - before <= chunk
        assert after % SIZE == 0


@given(texts, st.integers(0, 320), st.integers(0, 320), st.integers(1, 9))
def test_ends_are_found_from_any_length(
    prompt: list[int], start: int, most: int, blocks: int
) -> None:
    ends = ChunkEnds.of(np.array(prompt), {END}, blocks * SIZE, LEAST, SIZE)
    every = [*ends.between(0, 400)]
    assert [*ends.between(start, most)] == [e for e in every if start < e <= most]
    assert ends.following(start) == next(end for end in every if end > start)
    assert ends.within(start) == max([0, *(end for end in every if end <= start)])


@given(texts, shapes, st.integers(0, 100), st.randoms(use_true_random=False))
def test_turns_change_no_eviction_for_others(
    prompt: list[int],
    shape: tuple[EvictionSchedule, int],
    outputs: int,
    random: Random,
) -> None:
    """Blocks go at ends of chunks, at the prompt's, or where `E` grows behind it."""
    schedule, chunk = shape
    size = schedule.block_size
    ends = ChunkEnds.of(np.array(prompt), {END}, chunk, max(size, chunk // 4), size)
    known = len(prompt) + outputs
    alone = read(len(prompt), known, ends, schedule)
    crowded = read(len(prompt), known, ends, schedule, room=random.randint)
    assert evictions(crowded, schedule) == evictions(alone, schedule)
    places = {*ends.between(0, len(prompt)), *range(len(prompt), known + 1)}
    assert {length for length, _ in evictions(alone, schedule)} <= places


def test_who_never_evicts_may_be_read_at_once() -> None:
    """A prompt that was kept whole was read in chunks all the same."""
    schedule = EvictionSchedule(block_size=16, budget=64, stride=32, until=0)
    assert next_step_ends(0, 5000, 5000, ChunkEnds(64), schedule) == (64, 5000)
    assert next_step_ends(4990, 5000, 5000, ChunkEnds(64), schedule) == (4992, 5000)


@given(shapes, st.integers(1, 500), st.integers(0, 300))
def test_every_step_gets_ahead_by_a_chunk_at_most(
    shape: tuple[EvictionSchedule, int], prompt: int, outputs: int
) -> None:
    """But for those before the first eviction."""
    schedule, chunk = shape
    ends = read(prompt, prompt + outputs, ChunkEnds(chunk), schedule)
    assert ends[-1] == prompt + outputs
    for before, after in pairwise(ends):
        assert after - before > 0
        assert after - before <= chunk or after <= schedule.max_live_tokens()


@given(shapes, st.integers(1, 500), st.integers(0, 300))
def test_prompt_steps_end_at_multiples_whatever_was_generated(
    shape: tuple[EvictionSchedule, int], prompt: int, outputs: int
) -> None:
    schedule, chunk = shape
    ends = read(prompt, prompt + outputs, ChunkEnds(chunk), schedule)
    expected = [*range(chunk, prompt, chunk), prompt]
    evicting = [end for end in expected if schedule.evicted_blocks(end)]
    assert [end for end in ends if end <= prompt and end in evicting] == evicting
    places = {*expected, *range(prompt, prompt + outputs + 1)}
    assert places.issuperset(ends[1:])


@given(shapes, st.integers(1, 500))
def test_a_prompt_takes_no_less_than_a_chunk(
    shape: tuple[EvictionSchedule, int], prompt: int
) -> None:
    """Else short prompts could for ever take what a whole chunk is waiting for."""
    schedule, chunk = shape
    ends = read(prompt, prompt, ChunkEnds(chunk), schedule, room=min)
    places = {*range(0, prompt, chunk), schedule.max_live_tokens(), prompt}
    assert places.issuperset(ends)
    short = [after - before for before, after in pairwise(ends)]
    assert all(taken >= min(chunk, prompt) for taken in short[:-2])


@given(
    shapes,
    st.integers(1, 500),
    st.integers(0, 300),
    st.randoms(use_true_random=False),
)
def test_how_much_room_a_step_has_changes_no_eviction(
    shape: tuple[EvictionSchedule, int], prompt: int, outputs: int, random: Random
) -> None:
    schedule, chunk = shape
    known = prompt + outputs
    ends = read(prompt, known, ChunkEnds(chunk), schedule)
    crowded = read(prompt, known, ChunkEnds(chunk), schedule, room=random.randint)
    assert evictions(crowded, schedule) == evictions(ends, schedule)


@given(shapes, st.integers(1, 500), st.integers(0, 300))
def test_no_step_behind_the_prompt_jumps_over_an_eviction(
    shape: tuple[EvictionSchedule, int], prompt: int, outputs: int
) -> None:
    schedule, chunk = shape
    ends = read(prompt, prompt + outputs, ChunkEnds(chunk), schedule)
    for before, after in pairwise(ends):
        if before >= prompt:
            assert schedule.next_eviction(before) >= after


@given(
    shapes,
    st.integers(1, 500),
    st.integers(1, 300),
    st.lists(st.integers(0, 400), max_size=3),
)
def test_a_resumed_request_evicts_where_the_first_run_did(
    shape: tuple[EvictionSchedule, int],
    prompt: int,
    outputs: int,
    preemptions: list[int],
) -> None:
    """Preempted after any number of steps, any number of times."""
    schedule, chunk = shape
    total = prompt + outputs

    def run(known: int) -> list[int]:
        # what is known in chunks, the rest token by token
        ends = read(prompt, known, ChunkEnds(chunk), schedule)
        return ends + list(range(known + 1, total + 1))

    expected = evictions(run(prompt), schedule)
    known = prompt
    for num_steps in preemptions:
        ends = run(known)[: num_steps + 1]
        seen = evictions(ends, schedule)
        assert seen == expected[: len(seen)]
        # computing the last known token yields one more
        known = min(total, max(known, ends[-1] + 1 if ends[-1] >= known else 0))
    assert evictions(run(known), schedule) == expected


@pytest.mark.parametrize(
    ("computed", "end"),
    [
        # E grows at 96, 128, 160 and so on
        pytest.param(90, 96, id="in an answer"),
        pytest.param(96, 110, id="a chunk ends before E grows"),
        pytest.param(110, 128, id="its last token"),
        pytest.param(128, 174, id="between answers, no E; a chunk ends first"),
        pytest.param(174, 200, id="where an answer begins, what the question grew by"),
        pytest.param(200, 224, id="in an answer that goes on"),
        pytest.param(224, 230, id="the prompt ends"),
        pytest.param(230, 238, id="resumed: a chunk ends"),
        pytest.param(238, 250, id="resumed: all that is known"),
    ],
)
def test_worked_examples_with_answers(computed: int, end: int) -> None:
    answers = Answers((80, 200), (128, NEVER))
    chunks = ChunkEnds(64, (48, 110), answers)
    assert next_step_ends(computed, 230, 250, chunks, SCHEDULE) == (end, end)


def test_answers_do_not_stop_who_evicts_nothing_yet() -> None:
    """Up to the last chunk's end before the first eviction, or the prompt's."""
    chunks = ChunkEnds(16, answers=Answers((10,), (90,)))
    assert next_step_ends(0, 300, 300, chunks, SCHEDULE) == (16, 80)
    assert next_step_ends(80, 300, 300, chunks, SCHEDULE) == (96, 96)
    assert next_step_ends(0, 95, 95, chunks, SCHEDULE) == (16, 95)


CUE = (8, 9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param([1] * 18 + [*CUE, 1, END] + [1] * 20, [20, 52], id="a block on"),
        pytest.param([1] * 15 + [*CUE, 1, END] + [1] * 20, [32], id="in the block"),
        pytest.param(
            [1] * 14 + [END, *CUE, 1, END] + [1] * 20, [12, 44], id="a question does"
        ),
        pytest.param(
            [1] * 17 + [END, *CUE, END] + [1] * 20, [16, 48], id="behind the question"
        ),
        pytest.param(
            [1] * 15 + [*CUE, END, END] + [1] * 20,
            [32],
            id="the next question's, in the block",
        ),
    ],
)
def test_an_answer_cuts_no_prompt_before_it(
    text: list[int], expected: list[int]
) -> None:
    """What the prompt was read by, when the answer had yet to be written."""
    ends = ChunkEnds.of(np.array(text), {END}, CHUNK, LEAST, SIZE, CUE)
    assert [*ends.between(0, 52)][: len(expected)] == expected


few_or_many = st.one_of(st.integers(0, 3), st.integers(0, 3), st.integers(0, 50))
turns = st.builds(
    lambda question, has_end, answer, stray: [
        *[1] * question,
        *[END] * has_end,
        *CUE,
        *[2] * answer,
        # what an answer may have in it
        *CUE[:stray],
        END,
    ],
    few_or_many,
    st.booleans(),
    few_or_many,
    st.integers(0, 2),
)
conversations = st.lists(turns, min_size=3, max_size=20).map(lambda all: sum(all, []))
# so that something is evicted in most blocks, of which turns may end within one
tight_shapes = st.builds(
    lambda size, budget, stride, chunk: (
        EvictionSchedule(size, budget * size, stride * size),
        chunk * size,
    ),
    st.sampled_from([8, 16]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(2, 6),
)


@given(
    conversations,
    tight_shapes,
    st.integers(1, 2),
    st.integers(0, 99),
    st.randoms(use_true_random=False),
)
def test_a_conversation_is_read_as_it_was_written(
    text: list[int],
    shape: tuple[EvictionSchedule, int],
    least: int,
    more: int,
    random: Random,
) -> None:
    """Whatever was known of an answer when its prompt was read, none of it or some."""
    schedule, chunk = shape
    size = schedule.block_size

    def run(prompt: list[int], total: int) -> list[tuple[int, int]]:
        # the prompt in chunks, the rest token by token
        ends = ChunkEnds.of(np.array(prompt), {END}, chunk, least * size, size, CUE)
        steps = read(len(prompt), len(prompt), ends, schedule)
        return evictions([*steps, *range(len(prompt) + 1, total + 1)], schedule)

    again = run([*text, *[1] * more], len(text) + more)
    ids = np.array(text)
    answers = Answers.of(ids, CUE, turn_lengths(ids, {END}))
    for start, end in zip(answers.starts, answers.ends, strict=True):
        expected = [step for step in again if step[0] <= end]
        for known in (start, random.randint(start, end)):
            assert run(text[:known], end) == expected
