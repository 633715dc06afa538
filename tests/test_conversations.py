# SPDX-License-Identifier: Apache-2.0
"""Next turns of conversations that evict, with `prefix_hits: exact`.

`PagedWorker` holds each hit to what a sequence keeps that reads the whole prompt.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch
from vllm.config import ModelConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request

from benchmarks.serving.engines import MODELS
from tests.chats import (
    ANSWER,
    CUE,
    END,
    HEADER,
    MODES,
    QUESTION,
    ask,
    conversation,
    crowd,
    driver_of,
    driver_of_longer,
    most_blocks_held,
    part_behind,
)
from tests.scheduler_driver import BLOCK_SIZE, Driver, Setup
from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache.earlier_turns import MAX_ANSWERS
from vllm_roco.turn_ends import turn_end_token_ids


@pytest.mark.parametrize("mode", MODES)
def test_a_next_turn_begins_at_the_last_questions_end(mode: dict[str, Any]) -> None:
    driver = driver_of(**mode)
    read = [*conversation(driver, [2], 12)]
    # the first question evicts nothing, and leaves no snapshot but beside windows
    later = read[2:]
    # what was said since, the cue behind the question, and less than a block
    assert max(later) <= QUESTION + ANSWER + 1 + 2 + 3
    assert driver.worker.num_evictions
    plain = Driver(Setup(chunk=32, caching=True, **mode))
    assert sum(conversation(plain, [2], 12)) > 1.3 * sum(read)


@pytest.mark.parametrize("mode", MODES[:-1])
@pytest.mark.parametrize("answer", [*range(1, 17)])
def test_a_next_turn_begins_behind_the_answer(
    mode: dict[str, Any], answer: int
) -> None:
    """However far the answer went on behind an eviction, or over one."""
    driver = driver_of(answer_start_token_ids=CUE, **mode)
    read = [*conversation(driver, [2], 12, answer)]
    # the last token written, the end token and the question; the third turn begins
    # with what the second has left, which was read for that
    assert max(read[2:]) <= QUESTION + 2
    assert driver.worker.num_evictions


def test_nobody_goes_on_from_an_answer_over_blocks_of_others() -> None:
    """Whose statistics have queries of others: of the turn before, that went on."""
    driver = driver_of(answer_start_token_ids=CUE, budget=24, stride=4)
    text = [20, END, *CUE]
    assert not ask(driver, text, 4)
    # a short turn, behind which nobody expects that the next one evicts
    text += [21, END, *CUE]
    assert not ask(driver, text, 20)
    assert driver.worker.num_hits == 1
    assert driver.worker.num_evictions
    text += [22, END, *CUE]
    assert not ask(driver, text, 4)
    text += [23, END, *CUE]
    assert ask(driver, text, 4)


@pytest.mark.parametrize("turn", range(1, 4))
def test_an_answer_may_look_like_several(turn: int) -> None:
    """It was written on where a prompt has neither of them."""

    def talk(end: int, cue: int) -> Driver:
        driver = Driver(
            Setup(
                chunk=32,
                stride=4,
                caching=True,
                turn_end_token_ids=(END, end),
                answer_start_token_ids=(cue,),
            )
        )
        text = [2] * 9
        for number in range(7):
            text += [*[70 + number] * 5, END, cue]
            ask(driver, text, 24)
        return driver

    # the worker writes the same, whatever is asked
    written = talk(END, CUE[0]).outputs[str(turn)]
    driver = talk(end=written[3], cue=written[9])
    assert driver.outputs[str(turn)] == written
    assert driver.worker.num_answers_hit


def test_what_follows_in_its_last_block_does_not_change_how_a_prompt_is_read() -> None:
    """A turn that ended there made a chunk's end that the prompt had not had."""

    def talk(*ends: int) -> Driver:
        driver = Driver(
            Setup(
                chunk=32,
                stride=4,
                caching=True,
                turn_end_token_ids=(END, *ends),
                answer_start_token_ids=CUE,
            )
        )
        text = [2] * 6
        for number in range(6):
            text += [*[70 + number] * 9, *CUE]
            assert len(text) % BLOCK_SIZE == 1
            # nothing, but for its end token
            ask(driver, text, 1)
            text += [70 + number] * 3
        # by somebody who begins with nothing
        driver.add(0, 1, prompt=text, cache_salt="another")
        driver.drain(1000)
        return driver

    written = talk().outputs.values()
    driver = talk(*(token for tokens in written for token in tokens))
    assert driver.worker.num_answers_hit


@pytest.mark.parametrize("mode", MODES)
def test_conversations_in_a_crowd_keep_what_each_would_alone(
    mode: dict[str, Any],
) -> None:
    """Preempted, short of memory, with options of their own for some turns."""
    num_answers_hit = num_evictions = num_preemptions = 0
    for seed in range(30):
        random = Random(seed)
        budget, stride, chunk = random.choice([(16, 8, 8), (24, 4, 32), (12, 16, 16)])
        driver = Driver(
            Setup(
                budget=budget,
                stride=stride,
                chunk=chunk,
                spare_blocks=random.choice([0, 8, 30, 200]),
                prefill_tokens=random.choice([1, 8, 64]),
                caching=True,
                # an answer may have the other token, too
                turn_end_token_ids=random.choice([(END,), (END, 7)]),
                answer_start_token_ids=CUE,
                allow_full=True,
                **mode,
            )
        )
        texts = {number: [2] * random.randrange(30) for number in range(4)}
        num_preemptions += crowd(driver, random, texts, range(1, 20))
        num_answers_hit += driver.worker.num_answers_hit
        num_evictions += driver.worker.num_evictions
    assert num_answers_hit > 80 or "windows" in mode
    assert num_evictions > 900
    assert num_preemptions > 30


@pytest.mark.parametrize(
    ("has_others", "expected"),
    [
        # the second turn leaves a snapshot there for others
        pytest.param(True, [245, 24, 24], id="behind a header that others have"),
        pytest.param(False, [25, 276, 24], id="alone"),
    ],
)
def test_a_turn_is_read_for_the_next_one_if_that_is_little(
    expected: list[int], *, has_others: bool
) -> None:
    """The third one is the first that evicts while it is read."""
    driver = driver_of_longer()
    turns = conversation(driver, HEADER, 4, 8)
    assert next(turns) == len(HEADER) + QUESTION
    if has_others:
        part_behind(HEADER, driver)
    assert [*turns] == expected


def test_conversations_with_one_header_share_it_to_its_end() -> None:
    """Once two have shown where they part."""
    driver = driver_of()
    header = [9] * 42 + [END]
    for expected in (len(header), len(header), 3):
        read, *_ = conversation(driver, header, 2)
        assert read == expected + QUESTION


def test_a_request_may_ask_for_smaller_chunks() -> None:
    """Which end at no turn's end; nobody's hit is within a chunk of its own."""
    driver = driver_of()
    prompt = [9] * 30 + [END] + [8] * 40
    for chunk in (4, 8, 12, 16, 32):
        for _ in range(2):
            driver.add(0, 4, prompt=prompt, extra_args={"roco_chunk": chunk})
            driver.drain(1000)
    assert driver.worker.num_hits >= 5


def test_who_evicts_nothing_begins_behind_no_answer_that_was_evicted_from() -> None:
    """Its row would have no gap, and the blocks of others in it."""
    driver = driver_of(answer_start_token_ids=CUE, allow_full=True)
    (*_,) = conversation(driver, [2], 4)
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    text = [2]
    for number in range(4):
        text += [20 + number] * (QUESTION - 3) + [END, *CUE]
        text += [*driver.outputs[str(number)], END]
    text += [50, END, *CUE]
    hits = cache.counts().snapshot_hits
    driver.add(0, 4, prompt=text, extra_args={"roco_mode": "full"})
    driver.drain(1000)
    assert cache.counts().snapshot_hits == hits
    driver.add(0, 4, prompt=text)
    driver.drain(1000)
    assert cache.counts().snapshot_hits == hits + 1


def test_what_is_told_without_effect_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Driver(Setup(caching=True, answer_start_token_ids=(94,)))
    assert "answer_start_token_ids = [94] does nothing" in caplog.text


@pytest.mark.parametrize("options", [{}, {"roco_budget": 0.5}])
def test_nothing_is_kept_that_no_next_turn_begins_with(options: dict[str, Any]) -> None:
    """Where a budget grows with the prompt, each turn keeps other blocks."""
    found = []
    for cue in ((), CUE):
        driver = driver_of(
            answer_start_token_ids=cue,
            mode="both" if options else "generation",
            max_budget=900,
        )
        num_read = sum(conversation(driver, [2], 8, 12, extra_args=options))
        cache = driver.scheduler.prefix_cache
        assert cache is not None
        found.append((num_read, cache.counts().published_snapshots))
    # nor does a turn do without blocks that it may begin with
    assert found[0] == found[1]


def test_samples_of_one_prompt_share_its_blocks_whatever_the_next_turn_does() -> None:
    """That could begin behind one of them, if each of them held all by itself."""
    most_held = []
    for cue in ((), CUE):
        driver = driver_of(answer_start_token_ids=cue, budget=200)
        text = [*[2] * 60, END, *CUE, 3, END, *[4] * 90, END, *CUE]
        for _ in range(4):
            driver.add(0, 20, prompt=text)
        most_held.append(most_blocks_held(driver))
    assert most_held[0] == most_held[1]
    assert most_held[1] < 2 * len(text) // BLOCK_SIZE


def test_answers_behind_an_image_are_read_in_whole_chunks() -> None:
    """As no next turn begins behind one, to read it as it was written wins nothing."""
    scheduler = driver_of(answer_start_token_ids=CUE).scheduler
    text = [9] * 8 + [END, *CUE] + [8] * 80
    image = MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier="picture",
        mm_position=PlaceholderRange(offset=2, length=3),
    )
    for features, is_told in (([], True), ([image], False)):
        request = Request(
            request_id=f"{len(features)} images",
            prompt_token_ids=text,
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            mm_features=features,
            block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
        )
        scheduler.add_request(request)
        plan = scheduler.request_plans.of(request.request_id)
        assert bool(plan.ends.answers.starts) == is_told


def test_of_many_answers_the_last_ones_are_looked_for(
    monkeypatch: MonkeyPatch,
) -> None:
    """A prompt can be made of nothing but answers; most have nothing to begin with."""
    driver = driver_of(answer_start_token_ids=CUE)
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    looks: list[object] = []
    monkeypatch.setattr(cache.store, "may_have", looks.append)
    driver.add(0, 1, prompt=[*[*CUE, 8, END] * 240, *CUE])
    assert 0 < len(looks) <= 3 * MAX_ANSWERS


def test_beside_embeddings_no_answer_is_told() -> None:
    """A key of its end would have the tokens that stand in for them."""
    scheduler = driver_of(answer_start_token_ids=CUE).scheduler
    assert scheduler.describe_prefix_caching() == "on, behind answers too"
    text = [*[9] * 50, *CUE, *[8] * 10, END, *[9] * 10, *CUE]
    request = with_embeddings(text, 9)
    scheduler.add_request(request)
    assert not scheduler.request_plans.of(request.request_id).ends.answers.starts


def with_embeddings(text: list[int], place_holder: int) -> Request:
    """Return a request whose tokens from the 8th to the 40th are embeddings."""
    is_token = [not 8 <= place < 40 for place in range(len(text))]
    return Request(
        request_id=f"embeddings in the place of {place_holder}",
        prompt_token_ids=[
            token if is_one else place_holder
            for token, is_one in zip(text, is_token, strict=True)
        ],
        prompt_embeds=torch.zeros(len(text), 8),
        prompt_is_token_ids=is_token,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def test_embeddings_end_no_turn() -> None:
    """Hits are by hashes, which do not have the tokens that stand in for them."""
    scheduler = driver_of().scheduler
    text = [9] * 59 + [END] + [8] * 40
    requests = [with_embeddings(text, token) for token in (END, 9)]
    for request in requests:
        scheduler.add_request(request)
    first, other = (scheduler.request_plans.of(x.request_id).ends for x in requests)
    assert requests[0].block_hashes == requests[1].block_hashes
    assert first == other
    assert [*first.between(0, 100)] == [32, 60, 92]


class Counted(tuple[int, ...]):
    """Ends of chunks that count how many of them are looked at."""

    num_looks = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        Counted.num_looks += len(found) if isinstance(place, slice) else 1
        return found


def test_a_waiting_request_is_not_looked_through(monkeypatch: MonkeyPatch) -> None:
    """Nor is a running one from place to place, whose next step is short."""
    driver = driver_of()
    cache = driver.scheduler.prefix_cache
    assert cache is not None
    text = [9 if (place + 1) % 8 else END for place in range(960)]
    request = driver.scheduler.requests[driver.add(0, 1, prompt=text)]
    plan = driver.scheduler.request_plans.of(request.request_id)
    ends = Counted(plan.ends.lengths)
    assert len(ends) == 120
    driver.scheduler.request_plans.enter(
        request.request_id, replace(plan, ends=replace(plan.ends, lengths=ends))
    )
    monkeypatch.setattr(Counted, "num_looks", 0)
    assert cache.last_length(request) == 0
    assert cache.first_stop(request, 40, 48) == 48
    assert 0 < Counted.num_looks < len(ends) / 2


class Model:
    """What is asked of vLLM's configuration."""

    def __init__(self, config: Any, text: Any, generation: dict[str, Any]) -> None:
        self.hf_config = type("Config", (), {"eos_token_id": config})
        self.hf_text_config = type("Config", (), {"eos_token_id": text})
        self._generation = generation

    def try_get_generation_config(self) -> dict[str, Any]:
        return self._generation


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param(Model(2, 2, {}), {2}, id="one"),
        pytest.param(Model([2, 5], 2, {"eos_token_id": [5, 9]}), {2, 5, 9}, id="all"),
        pytest.param(Model(None, 0, {"eos_token_id": 3}), {0, 3}, id="zero is one"),
        pytest.param(Model(None, None, {}), set(), id="none"),
        pytest.param(Model([[2], 5, None], {"a": 1}, {}), {5}, id="neither ids"),
        pytest.param(Model(True, 2.0, {"eos_token_id": "</s>"}), set(), id="no ids"),
        pytest.param(Model(-1, [-1, 4], {}), {4}, id="none, as a number"),
    ],
)
def test_turns_end_as_the_models_answers_do(model: Any, expected: set[int]) -> None:
    assert turn_end_token_ids(RocoConfig(), model) == expected
    assert turn_end_token_ids(RocoConfig(turn_end_token_ids=(44,)), model) == {44}
    assert turn_end_token_ids(RocoConfig(turn_end_token_ids=()), model) == set()


def test_a_configuration_of_vllms_has_what_is_asked() -> None:
    config = ModelConfig(str(MODELS / "qwen2.5-7b"), skip_tokenizer_init=True)
    assert turn_end_token_ids(RocoConfig(), config) == {151643}
