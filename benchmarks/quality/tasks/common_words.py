# SPDX-License-Identifier: Apache-2.0
"""The ten most common words of a long list: RULER's `cwe` (arXiv 2404.06654)."""

from __future__ import annotations

from benchmarks.quality.tasks.exchange import Exchange, Writer

TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than "
    "others. Memorize the ones that appear most often.\n{text}\n"
    "Question: What are the 10 most common words in the above list?\n\n"
    "Answer: The top 10 words that appear most often in the list are:"
)
ANSWER_TOKENS = 120
COMMON = 10
LONG = 3500
"""From so many tokens on RULER repeats every word, and the common ones more often."""


def write_common_words(writer: Writer, questions: int = 1) -> list[Exchange]:
    """Return a list of words, and the question after the ten most common ones.

    Args:
        writer: Draws words.
        questions: There is only one.
    """
    draw = writer.draw
    often, seldom = (30, 3) if writer.room >= LONG else (6, 1)
    if writer.room < LONG / 4:
        # else there would be no others
        often = 4
    words = draw.sample(writer.material.words, len(writer.material.words))
    common, rare = words[:COMMON], words[COMMON:]
    listed = [*common * often, *(word for word in rare for _ in range(seldom))]
    # most numbers have three digits
    lines = writer.fill((f" 100. {word}" for word in listed), TEXT)
    entries = listed[: len(lines)]
    draw.shuffle(entries)
    order = sorted(common, key=entries.index)
    text = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
    reply = "".join(f" {i}. {word}" for i, word in enumerate(order, 1))
    return [Exchange(TEXT.format(text=text), reply, tuple(order), ANSWER_TOKENS)]
