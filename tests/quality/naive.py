# SPDX-License-Identifier: Apache-2.0
"""The published methods as their papers tell them: one token, head and entry at a time.

Slow, and short enough to be checked by eye; the oracle is held against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass
class Entry:
    """One token in one layer's kv head, and the attention it received."""

    position: int
    key: torch.Tensor
    value: torch.Tensor
    total: float = 0.0
    squares: float = 0.0
    seen: int = 0
    last: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.seen

    @property
    def deviation(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.seen - self.mean**2))


Layer = list[list[Entry]]


class NaiveSequence:
    """One sequence under one method; `layers[layer][kv head]` lists what lives."""

    def __init__(
        self, model: PreTrainedModel, method: str, budget: int, stride: int, sink: int
    ) -> None:
        self.model = model
        self.method = method
        self.budget = budget
        self.stride = stride
        self.sink = sink
        self.computed = 0
        config = model.config
        self.layers: list[Layer] = [
            [[] for _ in range(config.num_key_value_heads)]
            for _ in range(config.num_hidden_layers)
        ]

    @torch.inference_mode()
    def read(self, token_ids: list[int]) -> int:
        """Read tokens in one step and return the one that is expected next."""
        llama = self.model.model
        hidden = llama.embed_tokens(torch.tensor([token_ids]))
        places = torch.arange(self.computed, self.computed + len(token_ids))[None]
        rotary = llama.rotary_emb(hidden, places)
        for block, layer in zip(llama.layers, self.layers, strict=True):
            normed = block.input_layernorm(hidden)
            attention = block.self_attn
            shape = (1, len(token_ids), -1, attention.head_dim)
            query, key, value = (
                project(normed).view(shape).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, *rotary)
            outputs = [
                self._attend(layer, place, query[0, :, i], key[0, :, i], value[0, :, i])
                for i, place in enumerate(places[0].tolist())
            ]
            hidden = hidden + attention.o_proj(torch.stack(outputs)[None])
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        before = self._evicted()
        self.computed += len(token_ids)
        self._evict(self._evicted() - before)
        logits = self.model.lm_head(llama.norm(hidden[0, -1]))
        return int(logits.argmax())

    def _attend(
        self,
        layer: Layer,
        place: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        outputs = []
        group = len(query) // len(layer)
        for head, entries in enumerate(layer):
            entries.append(Entry(place, key[head], value[head]))
            weights = []
            for one_query in query[head * group : (head + 1) * group]:
                logits = torch.stack([one_query @ entry.key for entry in entries])
                weight = (logits / math.sqrt(len(one_query))).softmax(0)
                values = torch.stack([entry.value for entry in entries])
                outputs.append(weight @ values)
                weights.append(weight)
            # the query heads of a kv head are averaged first, then squared
            received = torch.stack(weights).mean(0).tolist()
            for entry, mass in zip(entries, received, strict=True):
                entry.total += mass
                entry.squares += mass * mass
                entry.seen += 1
                entry.last = mass
        return torch.cat(outputs)

    def _evicted(self) -> int:
        return self.stride * max(0, (self.computed - self.budget) // self.stride)

    def _evict(self, number: int) -> None:
        if number == 0:
            return
        for layer in self.layers:
            per_head = [self._victims(entries, number) for entries in layer]
            if self.method == "tova":
                per_head = [self._tova_victims(layer, number)] * len(layer)
            for entries, gone in zip(layer, per_head, strict=True):
                entries[:] = [entry for entry in entries if entry.position not in gone]

    def _victims(self, entries: list[Entry], number: int) -> set[int]:
        if self.method == "token-roco":
            return self._roco_victims(entries, number)
        if self.method == "h2o":
            old = entries[: len(entries) - self.budget // 2]
            ordered = sorted(old, key=lambda entry: entry.total)
        else:
            ordered = [entry for entry in entries if entry.position >= self.sink]
        return {entry.position for entry in ordered[:number]}

    def _roco_victims(self, entries: list[Entry], number: int) -> set[int]:
        def volatility(entry: Entry) -> float:
            if entry.position < 4 or entry.position >= self.computed - 10:
                return math.inf
            return entry.deviation

        scope_size = max(number, self.budget - int(0.3 * self.budget))
        scope = sorted(entries, key=volatility)[:scope_size]
        scope = [entry for entry in scope if volatility(entry) < math.inf]
        scope.sort(key=lambda entry: entry.mean)
        return {entry.position for entry in scope[:number]}

    def _tova_victims(self, layer: Layer, number: int) -> set[int]:
        # the heads of a layer hold the same tokens
        by_token = zip(*layer, strict=True)
        ordered = sorted(by_token, key=lambda token: sum(head.last for head in token))
        return {token[0].position for token in ordered[:number]}
