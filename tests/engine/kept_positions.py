# SPDX-License-Identifier: Apache-2.0
"""Which positions each rank of an engine has kept, read from its workers' pages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from tests.engine.engines import Engine
from vllm_roco.kv_cache.page import first_positions_view

Positions = tuple[int, ...]


def first_positions(worker: Any, blocks: Sequence[int]) -> list[Positions]:
    """Return where blocks begin, in every layer of a worker."""
    layers = get_layers_from_vllm_config(worker.vllm_config, Attention).values()
    return [
        tuple(
            first_positions_view(layer.impl.page_shape.states_view(layer.kv_cache))[
                list(blocks)
            ].tolist()
        )
        for layer in layers
    ]


@contextlib.contextmanager
def recorded_positions(
    engine: Engine,
) -> Iterator[dict[tuple[int, ...], list[Positions]]]:
    """Record, per prompt, what each rank has kept when the request ends.

    Prompts must differ from each other. Positions are of full live blocks, sorted, and
    the same in all layers of a rank.
    """
    manager, requests = engine.manager, engine.scheduler.requests
    pop = manager.pop_blocks_for_free
    recorded: dict[tuple[int, ...], list[Positions]] = {}

    def record_and_pop(request_id: str) -> object:
        row, request = manager.req_to_blocks.get(request_id), requests.get(request_id)
        if row and request is not None and request.is_finished():
            # the last token was never computed
            full = (request.num_tokens - 1) // manager.block_size
            live = [block.block_id for block in row[:full] if not block.is_null]
            of_ranks = engine.core.model_executor.collective_rpc(
                first_positions, args=(live,)
            )
            for of_layers in of_ranks:
                assert len(set(of_layers)) == 1, "layers disagree"
                assert len(set(of_layers[0])) == len(live), "a block lies in two places"
            recorded[tuple(request.prompt_token_ids)] = [
                tuple(sorted(map(int, of_layers[0]))) for of_layers in of_ranks
            ]
        return pop(request_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "pop_blocks_for_free", record_and_pop)
        yield recorded
