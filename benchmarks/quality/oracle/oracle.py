# SPDX-License-Identifier: Apache-2.0
"""Greedy answers and losses of many sequences under one way of keeping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from benchmarks.quality.oracle.attention import load_model
from benchmarks.quality.oracle.eviction_method import EvictionMethod
from benchmarks.quality.oracle.live_batch import LiveBatch, cache_shape

_BYTES = {"cpu": 2**30, "cuda": 12 * 2**30}
"""What a batch may take beside the weights; several runs may share a device."""

T = TypeVar("T")


class Oracle:
    """A model that reads, forgets and answers.

    Prompts are read `chunk` tokens at a time, each chunk ending at a multiple of
    `chunk` or at the prompt's end; then one token a step. What is due goes at the end
    of a step. Sequences may differ in length, and share nothing but the time.
    """

    def __init__(self, model: str, device: str, dtype: torch.dtype) -> None:
        """Load a model.

        Args:
            model: Hugging Face folder of a decoder with plain causal attention.
            device: `cpu`, `cuda` or `cuda:0` and so on.
            dtype: Of weights, keys and values; statistics are float32 always.

        Raises:
            ValueError: The device is of another kind.
        """
        if torch.device(device).type not in _BYTES:
            raise ValueError(
                f"device = {device!r} is not allowed. Use {' or '.join(_BYTES)}."
            )
        self._model = load_model(model, device, dtype)
        self._device = torch.device(device)
        self._dtype = dtype
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], method: EvictionMethod, max_tokens: int
    ) -> list[list[int]]:
        """Return the greedy continuation of every prompt.

        Args:
            prompts: Token ids, at least one each.
            method: What is kept.
            max_tokens: Most tokens of a continuation. It ends earlier with the model's
                end-of-sequence token, which is then its last.

        Raises:
            ValueError: A prompt is empty, or `max_tokens` is below 1.
        """
        if max_tokens < 1:
            raise ValueError(
                f"max_tokens = {max_tokens} is not allowed. Use 1 or more."
            )
        run = functools.partial(self._generate_batch, method, max_tokens)
        return self._in_batches(prompts, run, method, max_tokens)

    @torch.inference_mode()
    def losses(
        self, sequences: Sequence[Sequence[int]], method: EvictionMethod, first: int
    ) -> list[list[float]]:
        """Return the negative log-likelihood of every token from the `first` on.

        Args:
            sequences: Token ids, more than `first` each; read in chunks.
            method: What is kept.
            first: Position of the first token that is judged, at least 1.

        Returns:
            Nats.

        Raises:
            ValueError: `first` is below 1, or a sequence is too short.
        """
        shortest = min((len(ids) for ids in sequences), default=first + 1)
        if not 1 <= first < shortest:
            raise ValueError(
                f"first = {first} is not allowed. Use 1 or more, and fewer than the "
                f"{shortest} tokens of the shortest sequence."
            )
        run = functools.partial(self._losses_batch, method, first)
        return self._in_batches(sequences, run, method, num_logits=method.chunk)

    @torch.inference_mode()
    def kept(
        self, prompts: Sequence[Sequence[int]], method: EvictionMethod
    ) -> list[torch.Tensor]:
        """Return the positions that live on once the prompt has been read.

        Args:
            prompts: Token ids, at least one each.
            method: What is kept.

        Returns:
            One `[layers or 1, kv heads or 1, tokens]` int64 for each prompt, ascending;
            1 where all layers or heads share one choice.
        """
        run = functools.partial(self._kept_batch, method)
        return self._in_batches(prompts, run, method)

    def _in_batches(
        self,
        sequences: Sequence[Sequence[int]],
        run: Callable[[list[Sequence[int]]], list[T]],
        method: EvictionMethod,
        max_tokens: int = 0,
        num_logits: int = 1,
    ) -> list[T]:
        """Run sequences of like length together, as many as fit."""
        if not all(sequences):
            raise ValueError("a prompt is empty. Give it at least one token.")
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        results: dict[int, T] = {}
        while order:
            longest = len(sequences[order[0]]) + max_tokens
            size = self._sequence_bytes(method, longest, num_logits)
            fit = max(1, _BYTES[self._device.type] // size)
            batch, order = order[:fit], order[fit:]
            answers = run([sequences[i] for i in batch])
            results |= zip(batch, answers, strict=True)
        return [results[i] for i in range(len(sequences))]

    def _sequence_bytes(
        self, method: EvictionMethod, num_tokens: int, num_logits: int
    ) -> int:
        """Return about what one sequence takes beside the weights."""
        config: Any = self._model.config.get_text_config()
        layers, kv_heads, head_size = cache_shape(config)
        live = method.most_live_tokens(num_tokens)
        size = self._dtype.itemsize
        cache = 2 * layers * kv_heads * live * head_size * size
        # logits, probabilities, and what is made of them on the way
        attention = 4 * 4 * config.num_attention_heads * method.chunk * live
        hidden = (
            4 * method.chunk * (config.intermediate_size + config.hidden_size) * size
        )
        logits = num_logits * config.vocab_size * (size + 8)
        return int(cache + attention + hidden + logits)

    def _generate_batch(
        self, method: EvictionMethod, max_tokens: int, prompts: list[Sequence[int]]
    ) -> list[list[int]]:
        batch = self._start(method, prompts, max_tokens)
        newest = self._read_prompts(batch, prompts, method.chunk)
        answers = [[token] for token in newest.tolist()]
        ended = [answer[-1] in self._ends for answer in answers]
        for _ in range(max_tokens - 1):
            if all(ended):
                break
            logits = self._read(batch, newest[:, None], [1] * len(prompts))
            newest = logits[:, -1].argmax(-1)
            for i, token in enumerate(newest.tolist()):
                if not ended[i]:
                    answers[i].append(token)
                    ended[i] = token in self._ends
        return answers

    def _kept_batch(
        self, method: EvictionMethod, prompts: list[Sequence[int]]
    ) -> list[torch.Tensor]:
        batch = self._start(method, prompts, 0)
        self._read_prompts(batch, prompts, method.chunk)
        return [
            batch.positions[:, i, :, :live].cpu() for i, live in enumerate(batch.live)
        ]

    def _read_prompts(
        self, batch: LiveBatch, prompts: list[Sequence[int]], chunk: int
    ) -> torch.Tensor:
        """Read prompts in chunks; return the token that each expects, `[n]` int64."""
        lengths = [len(prompt) for prompt in prompts]
        expected = torch.zeros(len(prompts), dtype=torch.int64, device=self._device)
        while batch.computed != lengths:
            counts = chunk_counts(batch.computed, lengths, chunk)
            logits = self._read(batch, self._rows(prompts, batch, counts), counts)
            # a row that reads nothing has its answer already
            reads = torch.tensor(counts, device=self._device) > 0
            expected = logits[:, -1].argmax(-1).where(reads, expected)
        return expected

    def _losses_batch(
        self, method: EvictionMethod, first: int, sequences: list[Sequence[int]]
    ) -> list[list[float]]:
        batch = self._start(method, sequences, 0)
        # the last token is judged and not read
        lengths = [len(ids) - 1 for ids in sequences]
        next_ids = [ids[1:] for ids in sequences]
        losses: list[list[float]] = [[] for _ in sequences]
        while batch.computed != lengths:
            counts = chunk_counts(batch.computed, lengths, method.chunk)
            targets = self._rows(next_ids, batch, counts)
            rows = self._rows(sequences, batch, counts)
            # the token at `first` is judged by what the one before it makes expect
            judged = [
                max(0, min(count, start + count - (first - 1)))
                for start, count in zip(batch.computed, counts, strict=True)
            ]
            width = max(1, *judged)
            logits = self._read(batch, rows, counts, width)
            values = F.cross_entropy(
                logits.flatten(0, 1).float(),
                targets[:, -width:].flatten(),
                reduction="none",
            )
            for i, row in enumerate(values.view(-1, width).tolist()):
                losses[i] += row[width - judged[i] :]
        return losses

    def _start(
        self, method: EvictionMethod, sequences: list[Sequence[int]], max_tokens: int
    ) -> LiveBatch:
        longest = max(len(ids) for ids in sequences) + max_tokens
        config = self._model.config
        return LiveBatch(method, config, sequences, longest, self._device, self._dtype)

    def _rows(
        self, sequences: list[Sequence[int]], batch: LiveBatch, counts: list[int]
    ) -> torch.Tensor:
        """Return the next tokens of every sequence, `[n, q]`, behind padding."""
        width = max(counts)
        rows = [
            [0] * (width - count) + list(ids[start : start + count])
            for ids, start, count in zip(sequences, batch.computed, counts, strict=True)
        ]
        return torch.tensor(rows, device=self._device)

    def _read(
        self,
        batch: LiveBatch,
        rows: torch.Tensor,
        counts: list[int],
        num_logits: int = 1,
    ) -> torch.Tensor:
        """Run one step, evictions included; return the last logits of every row."""
        step = batch.begin_step(counts)
        output = self._model(
            input_ids=rows,
            position_ids=step.positions,
            use_cache=False,
            logits_to_keep=num_logits,
            live_batch=batch,
        )
        batch.evict()
        logits: torch.Tensor = output.logits
        return logits


def chunk_counts(
    computed: Sequence[int], lengths: Sequence[int], chunk: int
) -> list[int]:
    """Return how many tokens each sequence reads next: up to a multiple of `chunk`."""
    return [
        min((start // chunk + 1) * chunk, length) - start
        for start, length in zip(computed, lengths, strict=True)
    ]
