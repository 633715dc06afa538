# SPDX-License-Identifier: Apache-2.0
"""Runs the CPU backend's classes as a model runner does, beside the dense reference."""

from __future__ import annotations

import copy
import functools
import random
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheLayout

from tests.attention.reference import DenseSequence
from tests.configs import engine_config
from tests.kv_cache.specs import bind_caches, one_group, roco_spec
from vllm_roco.attention.cpu.metadata import RocoCpuMetadata, RocoCpuMetadataBuilder
from vllm_roco.config import RocoConfig
from vllm_roco.fp8_cache import from_bytes, to_bytes
from vllm_roco.kv_cache.page import (
    MASS_PEAK,
    MASS_SQUARES,
    MASS_SUM,
    NUM_QUERIES,
    first_positions_view,
    page_view,
    statistics_view,
)


@functools.cache
def _base_config() -> VllmConfig:
    with tempfile.TemporaryDirectory() as folder:
        return engine_config(
            Path(folder),
            {},
            max_model_len=4096,
            max_num_seqs=4,
            max_num_batched_tokens=4096,
        )


def config_for(options: dict[str, Any]) -> VllmConfig:
    """Return a configuration in which no layer is built yet."""
    config = copy.copy(_base_config())
    config.additional_config = {"roco": options}
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.static_forward_context = {}
    return config


@dataclass(frozen=True)
class Shape:
    """A model and its cache.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Of queries, keys and values.
        dtype: Of activations and cache.
        block_size: Tokens per block.
        layout: Of the cache in memory.
        soft_cap: Of the scores.
        has_sinks: Whether the model has attention sinks.
        num_layers: Layers in one group.
        budget_blocks: Blocks kept per sequence.
        stride_blocks: Blocks evicted at a time.
        options: Further options of RoCo.
        scales: Of an fp8 cache, of keys and of values: a number each, or one for each
            kv head. None for a cache of the activations' type.
    """

    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    dtype: torch.dtype = torch.float32
    block_size: int = 16
    layout: KVCacheLayout = KVCacheLayout.LBHNC
    soft_cap: float | None = None
    has_sinks: bool = False
    num_layers: int = 2
    budget_blocks: int = 3
    stride_blocks: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    scales: tuple[torch.Tensor, torch.Tensor] | None = None


class Rig:
    """Sequences over a pool of pages that hold nan wherever nothing lives.

    Attributes:
        sequences: The dense twins, by the order in which they were added.
        rows: Block ids by logical block; entries of freed blocks are stale.
    """

    def __init__(self, shape: Shape, num_blocks: int = 160, seed: int = 0) -> None:
        self.shape = shape
        size = shape.block_size
        options = {
            "budget": shape.budget_blocks * size,
            "stride": shape.stride_blocks * size,
            "chunk": size,
            "sink": 0,
            "recent": 0,
            # reads values as well, and leaves the second stage a choice
            "shield": "contribution",
            "shield_ratio": 0.7,
            **shape.options,
        }
        self.config = RocoConfig(**options)
        spec = roco_spec(
            block_size=size,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            dtype=shape.dtype if shape.scales is None else torch.uint8,
            **options,
        )
        self.schedule = spec.schedule
        plan = one_group(spec, num_blocks, shape.num_layers)
        (group,) = plan.kv_cache_groups
        vllm_config = config_for(options)
        cache_config = copy.copy(vllm_config.cache_config)
        if shape.scales is not None:
            cache_config.cache_dtype = "fp8"
        vllm_config.cache_config = cache_config
        self.scale = shape.head_size**-0.5
        # all layers have the same
        self.sinks = None
        if shape.has_sinks:
            self.sinks = torch.zeros(shape.num_heads, dtype=shape.dtype)
        with set_current_vllm_config(vllm_config):
            self.layers = [
                Attention(
                    shape.num_heads,
                    shape.head_size,
                    self.scale,
                    shape.num_kv_heads,
                    cache_config=cache_config,
                    logits_soft_cap=shape.soft_cap,
                    prefix=name,
                    sinks=self.sinks,
                )
                for name in group.layer_names
            ]
        for layer in self.layers if shape.scales else ():
            layer._k_scale, layer._v_scale = shape.scales
        bound = bind_caches(plan, shape.layout)
        for layer, cache in zip(self.layers, bound, strict=True):
            layer.kv_cache = cache
        self.caches = [spec.page_shape.states_view(cache) for cache in bound]
        self.builder = RocoCpuMetadataBuilder(
            spec, group.layer_names, vllm_config, torch.device("cpu")
        )
        self.sequences: list[DenseSequence] = []
        self.rows: list[list[int]] = []
        self._num_shared: defaultdict[int, int] = defaultdict(int)
        # block 0 is vLLM's null block
        self._free = list(range(1, num_blocks))
        self._random = random.Random(seed)
        self._random.shuffle(self._free)
        self._generator = torch.Generator().manual_seed(seed)
        if self.sinks is not None:
            # weights are loaded when the layers are there
            self.sinks.normal_(std=2, generator=self._generator)

    def add(self) -> int:
        """Add an empty sequence and return its index."""
        self.sequences.append(
            DenseSequence(
                self.shape.num_layers,
                self.schedule,
                self.config,
                self.shape.soft_cap,
                self.sinks,
            )
        )
        self.rows.append([])
        return len(self.sequences) - 1

    def add_behind(self, donor: int, num_blocks: int) -> int:
        """Add a sequence that shares another one's first blocks, and return its index.

        While both take steps, neither may evict.

        Args:
            donor: The other sequence; nothing of it was evicted.
            num_blocks: Its full blocks that both attend over.
        """
        index, other = self.add(), self.sequences[donor]
        self.rows[index] = self.rows[donor][:num_blocks]
        self.sequences[index].begin_behind(other, num_blocks)
        for sequence in (donor, index):
            self._num_shared[sequence] = num_blocks
        return index

    def step(self, queries: dict[int, int]) -> None:
        """Run the given numbers of new tokens, and compare everything.

        Args:
            queries: New tokens by sequence; the rest of the batch.
        """
        metadata, slots = self.metadata(queries)
        for number, layer in enumerate(self.layers):
            cache = layer.kv_cache
            query = self._random_states(len(slots), self.shape.num_heads)
            key = self._random_states(len(slots), self.shape.num_kv_heads)
            value = self._random_states(len(slots), self.shape.num_kv_heads)
            expected = self._expected(queries, number, query, key, value)
            layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
            output = torch.full_like(query, torch.nan)
            result = layer.impl.forward(
                layer, query, key, value, cache, metadata, output
            )
            assert result is output
            self._compare(output, expected)
        for index, num_queries in queries.items():
            self._evict(index, num_queries)
        for index in queries:
            self._compare_pages(index)

    def _random_states(self, num_tokens: int, num_heads: int) -> torch.Tensor:
        # scores with a deviation of 2 single some tokens out
        size = (num_tokens, num_heads, self.shape.head_size)
        states = torch.randn(size, generator=self._generator) * 2**0.5
        return states.to(self.shape.dtype)

    def metadata(self, queries: dict[int, int]) -> tuple[RocoCpuMetadata, torch.Tensor]:
        """Give the new tokens blocks, and describe the step.

        Args:
            queries: New tokens by sequence.

        Returns:
            The step's metadata and slots, the batch padded as for a captured graph.
        """
        size = self.shape.block_size
        starts, lengths, slots = [0], [], []
        for index, num_queries in queries.items():
            row, before = self.rows[index], self.sequences[index].length
            after = before + num_queries
            while len(row) * size < after:
                row.append(self._free.pop())
            slots += [
                row[token // size] * size + token % size
                for token in range(before, after)
            ]
            starts.append(starts[-1] + num_queries)
            lengths.append(after)
        # a padded row without queries, and two padded tokens
        starts.append(starts[-1])
        lengths.append(0)
        slots += [-1, -1]
        table = torch.randint(
            0,
            self.caches[0].shape[0],
            (len(lengths), max(map(len, self.rows)) + 3),
            dtype=torch.int32,
            generator=self._generator,
        )
        for place, index in enumerate(queries):
            row = self.rows[index]
            table[place, : len(row)] = torch.tensor(row)
        start_loc = torch.tensor(starts, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=start_loc,
            query_start_loc_cpu=start_loc,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            num_reqs=len(lengths),
            num_actual_tokens=starts[-1],
            max_query_len=max(queries.values()),
            max_seq_len=max(lengths),
            block_table_tensor=table,
            slot_mapping=torch.tensor(slots),
        )
        return self.builder.build(0, common), common.slot_mapping

    def _expected(
        self, queries: dict[int, int], layer: int, *states: torch.Tensor
    ) -> torch.Tensor:
        outputs, first = [], 0
        for index, num_queries in queries.items():
            query, *written = (x[first : first + num_queries].double() for x in states)
            if self.shape.scales is not None:
                written = [
                    from_bytes(to_bytes(x, by), by).double()
                    for x, by in zip(written, self._scales, strict=True)
                ]
            sequence = self.sequences[index]
            outputs.append(sequence.attend(layer, query, *written, self.scale))
            first += num_queries
        return torch.cat(outputs)

    def _compare(self, output: torch.Tensor, expected: torch.Tensor) -> None:
        assert output.dtype == self.shape.dtype
        # rounding of the result, and of float32 sums over a few hundred tokens
        epsilon = torch.finfo(self.shape.dtype).eps
        torch.testing.assert_close(
            output[: len(expected)].double(), expected, rtol=epsilon, atol=2e-5
        )
        assert output[len(expected) :].isnan().all(), "padding was written to"

    def _evict(self, index: int, num_queries: int) -> None:
        resident, row = self.schedule.budget_blocks, self.rows[index]
        before = self.schedule.evicted_blocks(self.sequences[index].length)
        gone = len(self.sequences[index].evict(num_queries))
        outgoing = row[resident + before : resident + before + gone]
        for cache in self.caches:
            page_view(cache).view(torch.int8)[outgoing] = -1
        self._free += outgoing

    def live_blocks(self, index: int) -> list[int]:
        """Return the block ids that a sequence's next step attends over."""
        resident, row = self.schedule.budget_blocks, self.rows[index]
        evicted = self.schedule.evicted_blocks(self.sequences[index].length)
        return row[:resident] + row[resident + evicted :]

    def _compare_pages(self, index: int) -> None:
        """The live pages are the kept blocks, with their keys, values, statistics."""
        sequence, size = self.sequences[index], self.shape.block_size
        live = self.live_blocks(index)
        assert len(live) == len(sequence.kept)
        num_shared = self._num_shared[index]
        for layer, cache in enumerate(self.caches):
            found = set()
            for block in live:
                page = self._numbers(cache[block])
                logical = self._logical_of(sequence, layer, page)
                found.add(logical)
                if logical >= num_shared:
                    num_queries = sequence.length - logical * size
                    for kv_head in range(self.shape.num_kv_heads):
                        masses = sequence.masses[layer, kv_head, logical]
                        assert len(masses) == num_queries
                if self.config.measures:
                    self._compare_statistics(sequence, layer, logical, cache, block)
                tokens = slice(logical * size, (logical + 1) * size)
                states = torch.cat(
                    (sequence.keys[layer][tokens], sequence.values[layer][tokens]), -1
                ).transpose(0, 1)
                assert torch.equal(page[:, : states.shape[1]], states)
            assert found == sequence.kept

    @property
    def _scales(self) -> tuple[torch.Tensor, ...]:
        assert self.shape.scales is not None
        return tuple(scale.view(-1, 1) for scale in self.shape.scales)

    def _numbers(self, page: torch.Tensor) -> torch.Tensor:
        """Return `[num_kv_heads, block_size, 2 * head_size]` float64."""
        if self.shape.scales is None:
            return page.double()
        parts = zip(page.chunk(2, -1), self._scales, strict=True)
        numbers = [from_bytes(part, by.view(-1, 1, 1)) for part, by in parts]
        return torch.cat(numbers, -1).double()

    def _logical_of(
        self, sequence: DenseSequence, layer: int, page: torch.Tensor
    ) -> int:
        first_token = page[:, 0, : self.shape.head_size]
        size = self.shape.block_size
        (match,) = [
            logical
            for logical in sequence.kept
            if torch.equal(sequence.keys[layer][logical * size], first_token)
        ]
        return match

    def _compare_statistics(
        self,
        sequence: DenseSequence,
        layer: int,
        logical: int,
        cache: torch.Tensor,
        block: int,
    ) -> None:
        statistics = statistics_view(cache)[block].double()
        first = logical * self.shape.block_size
        assert first_positions_view(cache)[block] == first
        for kv_head in range(self.shape.num_kv_heads):
            masses = torch.tensor(
                sequence.masses[layer, kv_head, logical], dtype=torch.float64
            )
            expected = torch.zeros(4, dtype=torch.float64)
            expected[MASS_SUM] = masses.sum()
            expected[MASS_SQUARES] = masses.square().sum()
            expected[MASS_PEAK] = masses.max()
            expected[NUM_QUERIES] = len(masses)
            torch.testing.assert_close(
                statistics[kv_head], expected, rtol=1e-4, atol=1e-6
            )
