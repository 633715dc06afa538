# SPDX-License-Identifier: Apache-2.0
"""Greedy answers and losses of many sequences under one way of keeping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from benchmarks.quality.oracle.attention import load_model
from benchmarks.quality.oracle.eviction_method import EvictionMethod
from benchmarks.quality.oracle.live_batch import LiveBatch, cache_shape

_BYTES = {"cpu": 2**30, "cuda": 12 * 2**30}
"""What a batch may take beside the weights; several runs may share a device."""

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """What a sequence reads next, and how long it may answer.

    Attributes:
        token_ids: At least one.
        max_tokens: Most tokens of the answer, at least 1.
        to_the_end: Whether it is as long, whatever the model thinks. Otherwise it may
            end earlier with the model's end-of-sequence token, which is its last then.
    """

    token_ids: Sequence[int]
    max_tokens: int
    to_the_end: bool = False


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
        turns = [[Turn(prompt, max_tokens)] for prompt in prompts]
        return [answer for (answer,) in self.converse(turns, method)]

    @torch.inference_mode()
    def converse(
        self, conversations: Sequence[Sequence[Turn]], method: EvictionMethod
    ) -> list[list[list[int]]]:
        """Return greedy answers in conversations whose state lives on between turns.

        What was evicted in one turn is missing in all later ones. A turn's tokens are
        read behind the last answer as a prompt is.

        Args:
            conversations: All of equally many turns.
            method: What is kept.

        Returns:
            The answers of each conversation, its end token with it where it has one.

        Raises:
            ValueError: A turn has no tokens, or `max_tokens` below 1.
        """
        for turn in (turn for turns in conversations for turn in turns):
            if not turn.token_ids:
                raise ValueError("a prompt is empty. Give it at least one token.")
            if turn.max_tokens < 1:
                raise ValueError(
                    f"max_tokens = {turn.max_tokens} is not allowed. Use 1 or more."
                )
        run = functools.partial(self._converse_batch, method)
        lengths = [tokens_of(turns) for turns in conversations]
        return self._in_batches(conversations, lengths, run, method)

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
        lengths = list(map(len, sequences))
        return self._in_batches(sequences, lengths, run, method, method.chunk)

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
        return self._in_batches(prompts, list(map(len, prompts)), run, method)

    def _in_batches(
        self,
        sequences: Sequence[S],
        lengths: list[int],
        run: Callable[[list[S]], list[T]],
        method: EvictionMethod,
        num_logits: int = 1,
    ) -> list[T]:
        """Run sequences of like length together, as many as fit."""
        if not all(lengths):
            raise ValueError("a prompt is empty. Give it at least one token.")
        order = sorted(range(len(sequences)), key=lambda i: -lengths[i])
        results: dict[int, T] = {}
        while order:
            size = self._sequence_bytes(method, lengths[order[0]], num_logits)
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

    def _converse_batch(
        self, method: EvictionMethod, conversations: list[Sequence[Turn]]
    ) -> list[list[list[int]]]:
        firsts = [turns[0].token_ids for turns in conversations]
        batch = self._start(method, firsts, max(map(tokens_of, conversations)))
        texts: list[list[int]] = [[] for _ in conversations]
        answers: list[list[list[int]]] = [[] for _ in conversations]
        for turns in zip(*conversations, strict=True):
            for text, turn in zip(texts, turns, strict=True):
                text += turn.token_ids
            newest = self._read_prompts(batch, texts, method.chunk)
            for answer in answers:
                answer.append([])
            writes = [1] * len(texts)
            while True:
                for i, token in enumerate(newest.tolist()):
                    if writes[i]:
                        texts[i].append(token)
                        answers[i][-1].append(token)
                        is_last = token in self._ends and not turns[i].to_the_end
                        is_full = len(answers[i][-1]) == turns[i].max_tokens
                        writes[i] = int(not is_last and not is_full)
                if not any(writes):
                    break
                # who has ended reads nothing until the next turn
                rows = self._rows(texts, batch, writes)
                newest = self._read(batch, rows, writes)[:, -1].argmax(-1)
        return answers

    def _kept_batch(
        self, method: EvictionMethod, prompts: list[Sequence[int]]
    ) -> list[torch.Tensor]:
        batch = self._start(method, prompts, max(map(len, prompts)))
        self._read_prompts(batch, prompts, method.chunk)
        return [
            batch.positions[:, i, :, :live].cpu() for i, live in enumerate(batch.live)
        ]

    def _read_prompts(
        self, batch: LiveBatch, prompts: Sequence[Sequence[int]], chunk: int
    ) -> torch.Tensor:
        """Read on in chunks; return the token that each expects, `[n]` int64."""
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
        batch = self._start(method, sequences, max(map(len, sequences)))
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
        self, method: EvictionMethod, sequences: list[Sequence[int]], most_tokens: int
    ) -> LiveBatch:
        return LiveBatch(
            method,
            self._model.config,
            sequences,
            most_tokens,
            self._device,
            self._dtype,
        )

    def _rows(
        self, sequences: Sequence[Sequence[int]], batch: LiveBatch, counts: list[int]
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


def tokens_of(turns: Sequence[Turn]) -> int:
    """Return the most tokens that a conversation comes to."""
    return sum(len(turn.token_ids) + turn.max_tokens for turn in turns)


def chunk_counts(
    computed: Sequence[int], lengths: Sequence[int], chunk: int
) -> list[int]:
    """Return how many tokens each sequence reads next: up to a multiple of `chunk`."""
    return [
        min((start // chunk + 1) * chunk, length) - start
        for start, length in zip(computed, lengths, strict=True)
    ]
