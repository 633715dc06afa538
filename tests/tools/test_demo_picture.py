# SPDX-License-Identifier: Apache-2.0
"""What the demo's picture says by itself."""

from __future__ import annotations

from pathlib import Path

from tools.demo.measured import Sequence
from tools.demo.picture import draw_picture
from tools.demo.requests import Answer, Prompt
from tools.passkey import Passkey

PASSKEY = Passkey("", [], "1", range(0))


def answer(budget: int, seconds: float, passkey: Passkey | None = None) -> Answer:
    prompt = Prompt("a question" if passkey else "an essay", [], 8, budget, passkey)
    return Answer(prompt, "id", "", 160, 8, seconds, 2 * seconds)


def sequence(held: list[int], full: list[int], hit_tokens: int = 0) -> Sequence:
    return Sequence(
        [float(second) for second in range(len(held))], held, full, hit_tokens
    )


def test_the_picture_tells_what_was_held_and_how_long_a_hit_took(
    tmp_path: Path,
) -> None:
    path = tmp_path / "new" / "picture.svg"
    answers = [
        *(answer(64, seconds, PASSKEY) for seconds in (5.6, 0.8)),
        *(answer(budget, 1.0) for budget in (64, 32, 64)),
    ]
    sequences = [
        sequence([64, 96, 96], [64, 96, 160]),
        sequence([96, 64], [160, 160], hit_tokens=144),
        sequence([64, 80, 64], [64, 80, 96]),
        sequence([32, 48, 32], [32, 48, 64]),
        sequence([64, 96, 64], [64, 96, 112]),
    ]

    draw_picture(path, answers, sequences)

    drawn = path.read_text()
    for words in (
        "One long prompt: 96 of 160 tokens held",
        "first eviction",
        "Asked again: answered in 0.8 s, not 5.6 s",
        "144 of 160",
        "One batch, 3 requests, 2 budgets",
        "RoCo: at most 96 held",
        "RoCo: at most 48 held",
        "budget 32",
    ):
        assert f">{words}<" in drawn, words
    assert drawn.count(">RoCo: at most 96 held<") == 1, "one line of words a budget"


def test_a_text_that_fits_its_budget_is_drawn_without_an_eviction(
    tmp_path: Path,
) -> None:
    path = tmp_path / "picture.svg"
    whole = sequence([64, 80], [64, 80])
    answers = [*(answer(96, 1.0, PASSKEY) for _ in range(2)), answer(96, 1.0)]

    draw_picture(path, answers, [whole, whole, whole])

    assert ">One long prompt: 80 of 80 tokens held<" in path.read_text()
    assert "first eviction" not in path.read_text()
