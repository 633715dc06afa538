# SPDX-License-Identifier: Apache-2.0
"""The published methods of the oracle, against a naive one."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.quality.oracle import EvictionMethod, Oracle
from tests.quality.naive import NaiveSequence
from tests.quality.tiny_model import prompts

CHUNK, NEW_TOKENS = 20, 12

pytestmark = pytest.mark.usefixtures("one_thread")


def eviction(method: str) -> EvictionMethod:
    brings_own_ends = method not in ("sink-recent", "random")
    ends = {} if brings_own_ends else {"sink": 3, "recent": 6}
    return EvictionMethod.named(method, 28, 8, CHUNK, **ends)


@pytest.mark.parametrize("method", ["token-roco", "h2o", "tova", "sink-recent"])
def test_equals_the_naive_method(
    method: str, tiny_model: PreTrainedModel, tiny_oracle: Oracle
) -> None:
    lengths = (70, 45, 37)
    kept = tiny_oracle.kept(prompts(lengths), eviction(method))
    answers = tiny_oracle.generate(prompts(lengths), eviction(method), NEW_TOKENS)

    for prompt, positions, answer in zip(prompts(lengths), kept, answers, strict=True):
        naive = NaiveSequence(tiny_model, method, budget=28, stride=8, sink=3)
        for start in range(0, len(prompt), CHUNK):
            token = naive.read(prompt[start : start + CHUNK])
        lives = [
            [[entry.position for entry in head] for head in layer]
            for layer in naive.layers
        ]
        assert positions.expand(3, 2, -1).tolist() == lives
        assert len(lives[0][0]) < len(prompt), "nothing was evicted"
        expected = [token]
        while len(expected) < NEW_TOKENS:
            expected.append(naive.read(expected[-1:]))
        assert answer == expected


def test_methods_differ_in_who_shares_a_choice(tiny_oracle: Oracle) -> None:
    def distinct(method: str) -> int:
        positions = tiny_oracle.kept(prompts((70,)), eviction(method))[0]
        return len(positions.expand(3, 2, -1).flatten(0, 1).unique(dim=0))

    assert distinct("token-roco") == distinct("h2o") == distinct("random") == 6
    assert distinct("tova") == 3
    assert distinct("sink-recent") == 1


def test_random_spares_head_and_tail(tiny_oracle: Oracle) -> None:
    first, again = (
        tiny_oracle.kept(prompts((70,)), eviction("random")) for _ in range(2)
    )
    assert torch.equal(first[0], again[0])
    spared = [*range(3), *range(70 - 6, 70)]
    for positions in first[0].flatten(0, 1).tolist():
        assert len(positions) == 28 + (70 - 28) % 8
        assert set(spared) <= set(positions)
        assert positions == sorted(set(positions))
