# SPDX-License-Identifier: Apache-2.0
"""What generated problems are made of: a novel, words and names.

Training has its own of each, and none of the words that RULER's problems here use.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import cache

from benchmarks.quality.tasks.needle import NAMES
from benchmarks.quality.tasks.prose import FIRST_REPORT_SEED, novel
from benchmarks.quality.tasks.ruler import words as words_of_ruler

TRAINING_NAMES = (
    *("Athens", "Bergen", "Cardiff", "Dresden", "Florence", "Geneva", "Hamburg"),
    *("Krakow", "Lima", "Madrid", "Naples", "Ottawa", "Prague", "Quito", "Riga"),
    *("Seville", "Toronto", "Utrecht", "Vienna", "Warsaw", "Zurich", "Cairo", "Perth"),
)

_LONGEST_SENTENCE = 300
"""Characters. With longer ones, texts would end far before their context."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\b[a-z]{4,10}\b")


@dataclass(frozen=True)
class Material:
    """Text to draw from.

    Attributes:
        sentences: Of a novel, in their order, without very long ones.
        words: Single words in small letters, none of them twice.
        names: Of towns.
    """

    sentences: tuple[str, ...]
    words: tuple[str, ...]
    names: tuple[str, ...]


@cache
def report_material() -> Material:
    """Return what reports read."""
    text = novel(FIRST_REPORT_SEED)
    words = [word for word in _words(text) if not _is_for_training(word)]
    return Material(_sentences(text), tuple(words), NAMES)


@cache
def training_material() -> Material:
    """Return what adapters are trained on."""
    text = novel(0)
    foreign = words_of_ruler()
    words = [
        word for word in _words(text) if _is_for_training(word) and word not in foreign
    ]
    return Material(_sentences(text), tuple(words), TRAINING_NAMES)


def _sentences(text: str) -> tuple[str, ...]:
    sentences = _SENTENCE_END.split(" ".join(text.split()))
    return tuple(each for each in sentences if len(each) <= _LONGEST_SENTENCE)


def _words(text: str) -> list[str]:
    return sorted(set(_WORD.findall(text)))


def _is_for_training(word: str) -> bool:
    return zlib.crc32(word.encode()) % 2 == 1
