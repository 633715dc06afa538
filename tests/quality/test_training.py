# SPDX-License-Identifier: Apache-2.0
"""Adapters learn, are the same once merged, and are trained on what no report asks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality.tasks.material import report_material, training_material
from benchmarks.quality.tasks.ruler import words
from benchmarks.quality.training import evaluation, low_rank, samples
from benchmarks.quality.training.supply import Batch, make_batch, supply
from benchmarks.quality.training.training import Plan, loss_of, train
from tests.quality.tiny_model import save_tiny_model

LENGTHS = (512,)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    save_tiny_model(tmp_path, len(tokenizer))
    return tmp_path


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.usefixtures("one_thread")
def test_a_few_steps_teach_a_tiny_model(folder: Path, tokenizer: Any) -> None:
    model = load(folder)
    lines: list[str] = []
    plan = Plan(rank=4, rate=0.03, time_limit=60, steps=25, evaluate_every=10)
    with supply(tokenizer, 1024, 0, 1, LENGTHS) as batches:
        seen = batches.take(0.0)
        before = float(loss_of(model, seen).detach())
        course = train(model, batches, plan, lambda: {"task": 0.5}, lines.append)
    after = float(loss_of(model, seen).detach())

    assert after < before - 0.2
    assert course.steps == 25
    assert course.tokens > 25 * 512
    assert course.scores == {10: {"task": 0.5}, 20: {"task": 0.5}}


@pytest.mark.usefixtures("one_thread")
def test_the_loss_is_of_the_tokens_that_count(folder: Path) -> None:
    model = load(folder)
    ids = numpy.arange(24, dtype=numpy.int32).reshape(2, 12)
    weights = numpy.zeros((2, 12), numpy.float32)
    weights[0, 5], weights[1, 1] = 1, 3

    logits = model(torch.from_numpy(ids).long()).logits.log_softmax(-1)
    expected = -(logits[0, 4, ids[0, 5]] + 3 * logits[1, 0, ids[1, 1]]) / 4
    torch.testing.assert_close(loss_of(model, Batch(ids, weights)), expected)


@pytest.mark.usefixtures("one_thread")
def test_a_merged_model_is_the_trained_one(folder: Path, tokenizer: Any) -> None:
    model = load(folder)
    for parameter in low_rank.attach(model, 4):
        # what bfloat16 can hold, as the file does
        parameter.data = torch.randn_like(parameter).bfloat16().float() / 4
    low_rank.save(model, folder / "adapter", "tiny")
    merged = load(folder)
    untrained = load(folder)
    low_rank.merge(merged, folder / "adapter")

    ids = torch.arange(40)[None]
    with torch.inference_mode(), parametrize.cached():
        logits = model(ids).logits
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(untrained(ids).logits, logits, atol=1e-1)


def test_an_adapter_is_in_the_format_of_peft(folder: Path) -> None:
    model = load(folder)
    low_rank.attach(model, 4)
    low_rank.save(model, folder / "adapter", "tiny")

    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 32)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_{}.weight"
    assert tensors[name.format("A")].shape == (4, 48)
    assert tensors[name.format("B")].shape == (32, 4)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 3 * 7 * 2


@pytest.mark.usefixtures("one_thread")
def test_a_training_goes_on_from_an_adapter(folder: Path) -> None:
    """Without a step, what is there is what it started from."""
    model = load(folder)
    for parameter in low_rank.attach(model, 4):
        parameter.data = torch.randn_like(parameter).bfloat16().float()
    low_rank.save(model, folder / "adapter", "tiny")
    again, other = load(folder), load(folder)
    low_rank.attach(again, 4)
    low_rank.restore(again, folder / "adapter")
    low_rank.attach(other, 8)

    ids = torch.arange(40)[None]
    with torch.inference_mode(), parametrize.cached():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"q_proj, not \(8, 32\)"):
        low_rank.restore(other, folder / "adapter")


def test_only_tasks_with_a_share_are_drawn(tokenizer: Any) -> None:
    for index in range(3):
        sample = samples.draw_sample(f"{index}", tokenizer, 1024, {"derivation": 1})
        text = tokenizer.decode(sample.token_ids)
        assert text.startswith("Work out the steps")


def test_an_adapter_of_another_model_is_refused(folder: Path, tokenizer: Any) -> None:
    model = load(folder)
    low_rank.attach(model, 4)
    low_rank.save(model, folder / "adapter", "tiny")
    other = load(folder)
    del other.model.layers[2:]

    with pytest.raises(ValueError, match=r"model\.layers\.2\..*trained for, tiny"):
        low_rank.merge(other, folder / "adapter")


def test_training_has_words_names_and_text_of_its_own() -> None:
    ours, theirs = training_material(), report_material()

    assert len(ours.words) > 1000
    assert not set(ours.words) & (set(theirs.words) | words())
    assert not set(ours.names) & set(theirs.names)
    long = {sentence for sentence in theirs.sentences if len(sentence) > 60}
    assert len(long) > 1000
    assert not long & set(ours.sentences)


@pytest.mark.parametrize("length", samples.LENGTHS)
def test_a_batch_is_of_the_asked_size_and_weighs_answers(
    tokenizer: Any, length: int
) -> None:
    batch = make_batch("a", tokenizer, 2 * length, 1.0, (length,))
    again = make_batch("a", tokenizer, 2 * length, 1.0, (length,))

    assert (batch.token_ids == again.token_ids).all()
    assert batch.token_ids.shape == batch.weights.shape
    assert batch.token_ids.shape[0] == 2
    assert 0.6 * length < batch.token_ids.shape[1] <= length + 64
    assert (batch.weights.sum(1) > 1).all()
    assert not batch.weights[:, 0].any()


@pytest.mark.parametrize("task", samples.TASKS)
def test_answers_are_what_counts(tokenizer: Any, task: str) -> None:
    draw = random.Random(1)
    exchanges = samples.write(task, draw, "seed", tokenizer, 1536)
    sample = samples.encode(exchanges, tokenizer, draw)

    marked = evaluation.mark(exchanges, tokenizer)
    assert marked.token_ids == sample.token_ids.tolist()
    answered = {i for span in marked.answers for i in span}
    weighed = {i for i, weight in enumerate(sample.weights) if weight}
    assert answered <= weighed
    assert sample.weights[sorted(answered)].sum() > 0.8 * sample.weights.sum()
    told = " ".join(exchange.reply for exchange in exchanges)
    assert all(answer in told for each in exchanges for answer in each.answers)


@pytest.mark.usefixtures("one_thread")
def test_a_model_is_judged_by_what_it_would_answer(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    prompt = list(range(30))
    (answer,) = evaluation.answers(model, [prompt], 6, tokenizer.eos_token_id)
    right = evaluation.Marked([*prompt, *answer], (range(30, 36),))
    wrong = evaluation.Marked([*prompt, *answer[:-1], 0], (range(30, 36),))
    assert evaluation.judge(model, {"a": [right], "b": [right, wrong]}) == {
        "a": 1.0,
        "b": 0.5,
    }
    padded = evaluation.answers(model, [prompt[3:], prompt], 6, tokenizer.eos_token_id)
    assert padded[1] == answer

    paper = evaluation.write_paper(tokenizer, 1, (1024,), 1)
    assert set(paper) == {f"{task} 1024" for task in evaluation.TASKS}
    assert all(0 <= score <= 1 for score in evaluation.judge(model, paper).values())
    scores = evaluation.answer_ruler(model, tokenizer, 1, (2048,))
    assert set(scores) == {"niah_multikey_2 2048", "vt 2048", "cwe 2048"}


def test_the_learning_rate_rises_and_falls_with_time() -> None:
    plan = Plan(rank=4, rate=1.0, time_limit=100)
    rates = [plan.rate_at(step, step / 1000) for step in range(1000)]

    assert rates[0] < 0.1 < 0.9 < max(rates) <= 1
    assert rates[-1] == pytest.approx(0.02, abs=0.01)
    assert plan.progress(5, 25) == 0.25
    assert Plan(rank=4, rate=1.0, time_limit=100, steps=10).progress(5, 25) == 0.5
