# SPDX-License-Identifier: Apache-2.0
"""The oracle's full cache against Hugging Face, and one sequence against many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from benchmarks.quality.oracle import EvictionMethod, Oracle, oracle
from benchmarks.quality.oracle.eviction_method import METHODS
from tests.quality.tiny_model import prompts

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = EvictionMethod("full", chunk=20)


def eviction(name: str, chunk: int = 20) -> EvictionMethod:
    return EvictionMethod(
        name, budget=24, stride=8, chunk=chunk, block_size=4, sink=3, recent=6
    )


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


@pytest.mark.parametrize("mode", oracle.LOSS_MODES)
def test_the_full_caches_losses_are_hugging_faces(
    mode: str, tiny_model: PreTrainedModel, tiny_oracle: Oracle
) -> None:
    texts = [ids for ids in prompts() if len(ids) > 30]
    losses = tiny_oracle.losses(texts, FULL, 30, mode)
    for text, values in zip(texts, losses, strict=True):
        with torch.inference_mode():
            logits = tiny_model(torch.tensor([text])).logits[0, 29:-1]
        expected = F.cross_entropy(logits, torch.tensor(text[30:]), reduction="none")
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_nobody_else_in_the_batch_matters(method: str, tiny_oracle: Oracle) -> None:
    together = tiny_oracle.generate(prompts(), eviction(method), 20)
    alone = [tiny_oracle.generate([ids], eviction(method), 20)[0] for ids in prompts()]
    assert together == alone


def test_small_batches_come_back_in_order(
    tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_oracle.generate(prompts(), eviction("roco"), 5)
    monkeypatch.setitem(oracle._BYTES, "cpu", 1)
    assert tiny_oracle.generate(prompts(), eviction("roco"), 5) == whole


@pytest.mark.parametrize("method", ["roco", "token-roco", "tova"])
def test_chunks_of_one_read_a_prompt_as_generation_does(
    method: str, tiny_oracle: Oracle
) -> None:
    one = eviction(method, chunk=1)
    texts = [ids for ids in prompts() if len(ids) > 40]
    by_prompt, by_generation = (
        tiny_oracle.losses(texts, one, 10, mode) for mode in oracle.LOSS_MODES
    )
    for first, second in zip(by_prompt, by_generation, strict=True):
        assert first == pytest.approx(second, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
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
        ({"name": "snap"}, "name = 'snap'"),
        ({"budget": 20}, "budget = 20"),
        ({"stride": 0}, "stride = 0"),
        ({"chunk": 0}, "chunk = 0"),
        ({"shield": "max"}, "shield = 'max'"),
        ({"shield_ratio": 1.5}, "shield_ratio = 1.5"),
        ({"recent": 60}, "sink . recent = 80"),
    ],
)
def test_a_bad_method_is_told(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"name": "roco", "budget": 64} | changes
    with pytest.raises(ValueError, match=message):
        EvictionMethod(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "message"),
    [(("colour", 1), "option 'colour'"), (("scope", "team"), "scope = 'team'")],
)
def test_a_bad_option_is_told(
    option: tuple[str, str | float], message: str, tiny_oracle: Oracle
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_oracle.generate(
            prompts(), EvictionMethod("roco", 64, options=(option,)), 1
        )


def test_a_bad_call_is_told(tiny_folder: Path, tiny_oracle: Oracle) -> None:
    with pytest.raises(ValueError, match="device = 'meta'"):
        Oracle(str(tiny_folder), "meta", torch.float32)
    with pytest.raises(ValueError, match="prompt is empty"):
        tiny_oracle.generate([[1], []], FULL, 1)
    with pytest.raises(ValueError, match="max_tokens = 0"):
        tiny_oracle.generate([[1]], FULL, 0)
    with pytest.raises(ValueError, match="first = 2"):
        tiny_oracle.losses([[1, 2]], FULL, 2, "prompt")
    with pytest.raises(ValueError, match="mode = 'both'"):
        tiny_oracle.losses([[1, 2]], FULL, 1, "both")
