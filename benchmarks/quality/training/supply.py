# SPDX-License-Identifier: Apache-2.0
"""Batches made ahead in processes of their own, so that a GPU never waits for one."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any

import numpy

from benchmarks.quality.training.samples import LENGTHS, SHARES, Sample, draw_sample

FULL_LENGTH_AT = 0.35
"""Progress from which on texts of every length are drawn."""

_MULTIPLE = 64


@dataclass(frozen=True)
class Batch:
    """Texts of about one length, padded behind.

    Attributes:
        token_ids: `[texts, tokens]` int32.
        weights: `[texts, tokens]` float32, 0 for padding.
    """

    token_ids: numpy.ndarray
    weights: numpy.ndarray


def make_batch(
    seed: str,
    tokenizer: Any,
    tokens: int,
    progress: float,
    lengths: tuple[int, ...],
    shares: Mapping[str, float] = SHARES,
) -> Batch:
    """Return about `tokens` tokens of texts of one length.

    Args:
        seed: Of everything that is random.
        tokenizer: A fast Hugging Face tokenizer.
        tokens: Padding counts.
        progress: Of the training, 0 to 1: longer texts come later.
        lengths: Of texts, short ones first.
        shares: How often each task is drawn.
    """
    share = min(1.0, progress / FULL_LENGTH_AT)
    known = 1 + int(share * (len(lengths) - 1) + 1e-6)
    # all batches are as large, so that longer ones have fewer texts
    length = random.Random(seed).choices(lengths[:known], range(1, known + 1))[0]
    count = max(1, tokens // length)
    samples = [
        draw_sample(f"{seed} {index}", tokenizer, length, shares)
        for index in range(count)
    ]
    return pad(samples, tokenizer.eos_token_id)


def pad(samples: list[Sample], token: int) -> Batch:
    """Return a batch, as wide as its longest text in multiples of 64."""
    longest = max(len(sample.token_ids) for sample in samples)
    shape = (len(samples), -(-longest // _MULTIPLE) * _MULTIPLE)
    ids = numpy.full(shape, token, numpy.int32)
    weights = numpy.zeros(shape, numpy.float32)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.token_ids)] = sample.token_ids
        weights[row, : len(sample.weights)] = sample.weights
    return Batch(ids, weights)


class Supply:
    """Processes that make batches; ended by `close`."""

    def __init__(
        self,
        tokenizer: Any,
        tokens: int,
        seed: int,
        processes: int,
        lengths: tuple[int, ...] = LENGTHS,
        shares: Mapping[str, float] = SHARES,
    ) -> None:
        """Start them; no thread may have used a GPU before.

        Args:
            tokenizer: A fast Hugging Face tokenizer.
            tokens: Of a batch.
            seed: Of the training.
            processes: How many.
            lengths: Of texts, short ones first.
            shares: How often each task is drawn.
        """
        context = multiprocessing.get_context("fork")
        self._progress = context.Value("d", 0.0)
        # few are waiting, or they would be shorter than is due
        self._queue: Queue[Batch] = context.Queue(2 * processes)
        self._processes = [
            context.Process(
                target=_produce,
                args=(
                    *(self._queue, self._progress, tokenizer, tokens),
                    *(f"training {seed} {number}", lengths, shares),
                ),
                daemon=True,
            )
            for number in range(processes)
        ]
        for process in self._processes:
            process.start()

    def take(self, progress: float) -> Batch:
        """Return a batch, and tell how far the training is."""
        self._progress.value = progress
        return self._queue.get()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


@contextlib.contextmanager
def supply(*arguments: Any, **options: Any) -> Iterator[Supply]:
    """Yield a `Supply` that ends with the block."""
    found = Supply(*arguments, **options)
    try:
        yield found
    finally:
        found.close()


def _produce(
    queue: Queue[Batch],
    progress: Any,
    tokenizer: Any,
    tokens: int,
    seed: str,
    lengths: tuple[int, ...],
    shares: Mapping[str, float],
) -> None:
    index = 0
    while True:
        name = f"{seed} {index}"
        queue.put(make_batch(name, tokenizer, tokens, progress.value, lengths, shares))
        index += 1
