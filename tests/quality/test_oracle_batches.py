# SPDX-License-Identifier: Apache-2.0
"""The oracle's full cache against Hugging Face, and one sequence against many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from benchmarks.quality.oracle import EvictionMethod, Oracle, Turn, oracle
from benchmarks.quality.oracle.eviction_method import RULES
from tests.quality.tiny_model import prompts

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = EvictionMethod.named("full", chunk=20)
ENDS = {"sink": 3, "recent": 6}
NUMBERS = {
    "roco": {"unit": 4, **ENDS},
    "recent": {"unit": 4, **ENDS},
    "sink-recent": ENDS,
    "random": ENDS,
}
"""Fields of the rule, of methods that do not bring their own."""


def eviction(name: str) -> EvictionMethod:
    return EvictionMethod.named(name, 24, 8, 20, **NUMBERS.get(name, {}))


def test_the_full_cache_answers_as_hugging_face_does(
    tiny_model: PreTrainedModel, tiny_oracle: Oracle
) -> None:
    answers = tiny_oracle.generate(prompts(), FULL, 30)
    for prompt, answer in zip(prompts(), answers, strict=True):
        expected = tiny_model.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False
        )
        assert answer == expected[0, len(prompt) :].tolist()
        assert len(set(answer)) > 5, "too monotonous a text to tell anything"


def test_the_full_caches_losses_are_hugging_faces(
    tiny_model: PreTrainedModel, tiny_oracle: Oracle
) -> None:
    texts = [ids for ids in prompts() if len(ids) > 30]
    losses = tiny_oracle.losses(texts, FULL, 30)
    for text, values in zip(texts, losses, strict=True):
        with torch.inference_mode():
            logits = tiny_model(torch.tensor([text])).logits[0, 29:-1]
        expected = F.cross_entropy(logits, torch.tensor(text[30:]), reduction="none")
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", RULES)
def test_nobody_else_in_the_batch_matters(method: str, tiny_oracle: Oracle) -> None:
    together = tiny_oracle.generate(prompts(), eviction(method), 20)
    alone = [tiny_oracle.generate([ids], eviction(method), 20)[0] for ids in prompts()]
    assert together == alone


def conversations() -> list[list[Turn]]:
    """Two questions of each, answered at any length and at a fixed one."""
    return [
        [Turn(ids, 7), Turn(ids[3:15], 12, True), Turn(ids[:5], 9)] for ids in prompts()
    ]


def test_the_full_cache_converses_as_it_answers_all_that_was_said(
    tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_oracle.converse(conversations(), FULL)
    # an end token in the midst of the first answers, and of the fixed ones
    monkeypatch.setattr(tiny_oracle, "_ends", {whole[0][0][2], whole[1][1][5]})
    found = tiny_oracle.converse(conversations(), FULL)

    for turns, answers in zip(conversations(), found, strict=True):
        said: list[int] = []
        for turn, answer in zip(turns, answers, strict=True):
            said += turn.token_ids
            if turn.to_the_end:
                assert len(answer) == turn.max_tokens
            (expected,) = tiny_oracle.generate([said], FULL, turn.max_tokens)
            assert answer[: len(expected)] == expected
            said += answer
    assert len({len(answers[0]) for answers in found}) > 1


@pytest.mark.parametrize("method", RULES)
def test_nobody_else_in_a_batch_of_conversations_matters(
    method: str, tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who had ended an answer read its last token again and again meanwhile."""
    first = tiny_oracle.converse(conversations(), eviction(method))
    monkeypatch.setattr(tiny_oracle, "_ends", {first[0][0][2]})
    together = tiny_oracle.converse(conversations(), eviction(method))
    alone = [
        tiny_oracle.converse([turns], eviction(method))[0] for turns in conversations()
    ]
    assert together == alone
    answers = tiny_oracle.generate(prompts(), eviction(method), 7)
    assert [answers[0] for answers in together] == answers


def test_what_one_turn_evicts_is_missing_in_the_next(tiny_oracle: Oracle) -> None:
    """Read anew as a whole, a text is seen by its own chunks before it goes."""
    kept, whole = [], []
    for turns in conversations()[:2]:
        (answers,) = tiny_oracle.converse([turns], eviction("recent"))
        said = [*turns[0].token_ids, *answers[0], *turns[1].token_ids]
        kept.append(answers[1])
        whole += tiny_oracle.generate([said], eviction("recent"), 12)
    assert kept != whole


def test_small_batches_come_back_in_order(
    tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_oracle.generate(prompts(), eviction("roco"), 5)
    monkeypatch.setitem(oracle._BYTES, "cpu", 1)
    assert tiny_oracle.generate(prompts(), eviction("roco"), 5) == whole


@pytest.mark.gpu
@pytest.mark.parametrize("method", RULES)
def test_a_gpu_answers_as_the_cpu_does(
    method: str, tiny_folder: Path, tiny_oracle: Oracle
) -> None:
    gpu = Oracle(str(tiny_folder), "cuda", torch.float32)
    expected = tiny_oracle.generate(prompts(), eviction(method), 20)
    assert gpu.generate(prompts(), eviction(method), 20) == expected


def test_generation_ends_with_the_models_end_token(
    tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = tiny_oracle.generate(prompts(), FULL, 30)
    end = answers[0][7]
    monkeypatch.setattr(tiny_oracle, "_ends", {end})
    for whole, cut in zip(
        answers, tiny_oracle.generate(prompts(), FULL, 30), strict=True
    ):
        expected = whole[: whole.index(end) + 1] if end in whole else whole
        assert cut == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "snap"}, "'snap' is no method"),
        ({"budget": 20}, "budget = 20"),
        ({"stride": 0}, "stride = 0"),
        ({"chunk": 0}, "chunk = 0"),
        ({"shield": "max"}, "shield = 'max'"),
        ({"shield_ratio": 1.5}, "shield_ratio = 1.5"),
        ({"recent": 60}, "sink . recent = 80"),
        ({"scope": "team"}, "scope = 'team'"),
    ],
)
def test_a_bad_method_is_told(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"name": "roco", "budget": 64} | changes
    with pytest.raises(ValueError, match=message):
        EvictionMethod.named(**arguments)


def test_an_unknown_option_is_told() -> None:
    with pytest.raises(TypeError, match="'colour'"):
        EvictionMethod.named("roco", 64, colour=1)


def test_a_bad_call_is_told(tiny_folder: Path, tiny_oracle: Oracle) -> None:
    with pytest.raises(ValueError, match="device = 'meta'"):
        Oracle(str(tiny_folder), "meta", torch.float32)
    with pytest.raises(ValueError, match="prompt is empty"):
        tiny_oracle.generate([[1], []], FULL, 1)
    with pytest.raises(ValueError, match="max_tokens = 0"):
        tiny_oracle.generate([[1]], FULL, 0)
    with pytest.raises(ValueError, match="prompt is empty"):
        tiny_oracle.converse([[Turn([1], 1), Turn([], 1)]], FULL)
    with pytest.raises(ValueError, match="first = 2"):
        tiny_oracle.losses([[1, 2]], FULL, 2)
