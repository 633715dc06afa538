# SPDX-License-Identifier: Apache-2.0
"""The CPU implementation against a dense reference, step by step.

`Rig.step` compares outputs, live pages and statistics after every step, over pages that
hold nan behind each sequence's last token and in every block that it does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.attention.rig import Rig, Shape
from vllm_roco.attention.backend import RocoBackend
from vllm_roco.attention.cpu import impl, metadata
from vllm_roco.kv_cache.page import (
    MASS_SUM,
    NUM_QUERIES,
    first_positions_view,
    statistics_view,
)

# B 3 and S 2 blocks of 16: the first eviction is at 80 tokens
EDGES = [1, 15, 16, 17, 47, 48, 49, 79, 80, 81, 112, 150]


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_ragged(rig: Rig, lengths: list[int], num_decodes: int) -> None:
    """Read prompts of the given lengths in one step, then decode all together."""
    first = {rig.add(): length for length in lengths}
    rig.step(first)
    for _ in range(num_decodes):
        rig.step(dict.fromkeys(first, 1))


@pytest.mark.parametrize("layout", RocoBackend.supported_kv_cache_layouts())
def test_ragged_prompts_then_decodes(layout: Any) -> None:
    run_ragged(Rig(Shape(layout=layout, num_layers=1)), EDGES, 3)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(Shape(num_heads=4, num_kv_heads=4), id="MHA"),
        pytest.param(Shape(num_heads=6, num_kv_heads=2), id="GQA"),
        pytest.param(Shape(num_heads=4, num_kv_heads=1), id="MQA"),
        pytest.param(Shape(head_size=80), id="head-80"),
        pytest.param(Shape(head_size=128), id="head-128"),
        pytest.param(Shape(soft_cap=1.5), id="soft-cap"),
        pytest.param(Shape(has_sinks=True, num_heads=6, num_kv_heads=2), id="sinks"),
        pytest.param(
            Shape(has_sinks=True, dtype=torch.bfloat16, soft_cap=1.5),
            id="sinks-bfloat16-soft-cap",
        ),
        pytest.param(Shape(num_layers=5), id="five-layers"),
        pytest.param(Shape(dtype=torch.bfloat16), id="bfloat16"),
        pytest.param(Shape(dtype=torch.float16, soft_cap=30.0), id="float16"),
        pytest.param(Shape(block_size=32), id="block-32"),
        pytest.param(Shape(block_size=64, num_kv_heads=1, num_heads=2), id="block-64"),
        pytest.param(
            Shape(block_size=128, num_kv_heads=1, num_heads=1), id="block-128"
        ),
        pytest.param(Shape(budget_blocks=1, stride_blocks=1), id="least-budget"),
        pytest.param(Shape(budget_blocks=2, stride_blocks=4), id="stride-over-budget"),
    ],
)
def test_prompts_and_decodes_over_several_evictions(shape: Shape) -> None:
    rig = Rig(shape, num_blocks=60)
    size = shape.block_size
    long, short = rig.add(), rig.add()
    # all resident blocks in a step, then a chunk, then a chunk beside a decode
    rig.step({long: shape.budget_blocks * size + 1, short: 3})
    rig.step({long: 2 * size})
    rig.step({short: 1, long: size + 3})
    # the next eviction comes within a decode
    ahead = rig.schedule.next_eviction(rig.sequences[long].length)
    rig.step({long: ahead - 1 - rig.sequences[long].length, short: 1})
    for _ in range(2):
        rig.step({long: 1, short: 1})
    assert rig.schedule.evicted_blocks(rig.sequences[long].length) > 0


@pytest.mark.parametrize(
    "scales",
    [
        pytest.param((torch.tensor(0.02), torch.tensor([3.0])), id="tensor"),
        pytest.param(
            (torch.tensor([0.5, 0.01]), torch.tensor([0.01, 2.0])), id="heads"
        ),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"shield": "contribution", "shield_ratio": 1},
        {"shield": "peak", "shield_ratio": 0.7},
        {"policy": "recent"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("layout", RocoBackend.supported_kv_cache_layouts())
def test_an_fp8_cache_is_attended_measured_and_evicted_by_what_it_holds(
    scales: tuple[torch.Tensor, torch.Tensor], options: dict[str, Any], layout: Any
) -> None:
    """Some numbers are too large for the smaller scales, and are the largest then."""
    shape = Shape(
        layout=layout,
        dtype=torch.bfloat16,
        scales=scales,
        options=options,
    )
    run_ragged(Rig(shape), EDGES, 3)
    rig = Rig(shape)
    sequence = rig.add()
    for num_queries in (60, 16, 40, 7, *[1] * 40):
        rig.step({sequence: num_queries})
    assert rig.schedule.evicted_blocks(rig.sequences[sequence].length) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"shield_ratio": 0, "shield": "peak"},
        {"shield_ratio": 1, "shield": "peak"},
        {"shield_ratio": 0.5, "shield": "contribution"},
        {"shield_ratio": 1, "shield": "contribution"},
        {"shield_ratio": 0.5, "shield": "peak"},
        {"shield_ratio": 0.5, "shield": "deviation"},
        {"sink": 16, "recent": 16},
        {"sink": 20, "recent": 5},
        {"policy": "h2o"},
        {"policy": "random", "sink": 16},
        {"policy": "recent"},
        {"policy": "recent", "sink": 16},
        {"policy": "recent", "sink": 64},
    ],
    ids=repr,
)
def test_what_is_kept_is_what_the_definition_keeps(options: dict[str, Any]) -> None:
    """A long run: a large prompt step, chunks, and decodes over many evictions."""
    rig = Rig(
        Shape(
            num_heads=2,
            num_kv_heads=2,
            head_size=64,
            num_layers=2,
            budget_blocks=4,
            stride_blocks=1,
            options=options,
        )
    )
    sequence = rig.add()
    for num_queries in (150, 16, 40, 7, *[1] * 50):
        rig.step({sequence: num_queries})


@pytest.mark.parametrize("max_scores", [1, 300, 1000, 5000])
def test_prompts_go_tile_by_tile(
    max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one query at a time to everything at once."""
    monkeypatch.setattr(impl, "MAX_SCORES", max_scores)
    rig = Rig(Shape(num_layers=1, num_heads=2, has_sinks=True))
    first, second = rig.add(), rig.add()
    rig.step({first: 90})
    rig.step({first: 21, second: 17})
    rig.step({first: 1, second: 40})


@pytest.mark.parametrize("max_tokens", [1, 100, 200])
def test_decodes_go_batch_by_batch(
    max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "MAX_BATCH_TOKENS", max_tokens)
    run_ragged(Rig(Shape(num_layers=1)), EDGES, 2)


@pytest.mark.parametrize("shield", ["contribution", "peak", "deviation"])
@pytest.mark.parametrize("max_scores", [200, impl.MAX_SCORES])
def test_blocks_that_two_sequences_share_count_the_queries_of_both(
    shield: str, max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts worked out of one sequence's length made the means of such blocks large.

    The one that evicts goes by means over all queries, also the other's.
    """
    monkeypatch.setattr(impl, "MAX_SCORES", max_scores)
    rig = Rig(Shape(options={"shield": shield, "shield_ratio": 0.4}))
    donor = rig.add()
    rig.step({donor: 37})
    other = rig.add_behind(donor, 2)
    # prompts and decodes by turns
    for _ in range(3):
        rig.step({other: 9})
        rig.step({donor: 11})
        rig.step({other: 1})
        rig.step({donor: 1})
    for layer, cache in enumerate(rig.caches):
        header = rig.rows[other][:2]
        assert header == rig.rows[donor][:2]
        found = statistics_view(cache)[header, 1, NUM_QUERIES].tolist()
        masses = [rig.sequences[other].masses[layer, 1, block] for block in (0, 1)]
        assert found == [len(seen) for seen in masses] == [103, 87]
        assert first_positions_view(cache)[header].tolist() == [0, 16]
    rig.step({other: 80 - rig.sequences[other].length})
    assert rig.schedule.evicted_blocks(rig.sequences[other].length) == 2


def test_the_masses_of_all_queries_sum_to_one_each() -> None:
    rig = Rig(Shape(budget_blocks=20, num_layers=1))
    sequence = rig.add()
    for num_queries in (100, 30, 1, 1, 1):
        rig.step({sequence: num_queries})
    statistics = statistics_view(rig.caches[0])[rig.rows[sequence]]
    total = statistics[..., MASS_SUM].sum(0)
    torch.testing.assert_close(total, torch.full_like(total, 133.0))


def test_what_a_sink_takes_no_key_gets() -> None:
    """Scores of 0 and sinks of log 2 and log 6: of 4 keys each gets 1/6 and 1/10."""
    keys = torch.zeros(1, 1, 4, 8)
    values = torch.ones_like(keys)
    sinks = torch.tensor([2.0, 6.0]).log()
    output, probabilities = impl.attend(
        torch.zeros(1, 1, 2, 8), keys, values, torch.tensor([4]), None, sinks
    )
    shares = torch.tensor([1 / 6, 1 / 10])
    expected = shares.view(1, 1, 2, 1, 1).expand(1, 1, 2, 1, 4)
    torch.testing.assert_close(probabilities, expected)
    expected = (4 * shares).view(1, 1, 2, 1).expand(1, 1, 2, 8)
    torch.testing.assert_close(output, expected)


def test_a_profiling_run_gives_zeros() -> None:
    """vLLM measures memory without metadata, before there is a cache."""
    rig = Rig(Shape(num_layers=1))
    (layer,) = rig.layers
    states = torch.ones(7, 4, 64)
    output = torch.full_like(states, torch.nan)
    empty = torch.empty(0)
    layer.impl.forward(layer, states, states, states, empty, None, output)
    assert (output == 0).all()


def test_the_last_layer_must_come_last() -> None:
    """Its eviction would lack the statistics of the layers behind it."""
    rig = Rig(Shape(num_layers=3))
    sequence = rig.add()
    rig.step({sequence: 5})
    metadata, slots = rig.metadata({sequence: 1})
    states = torch.zeros(len(slots), 4, 64)
    last = rig.layers[-1]
    with pytest.raises(RuntimeError, match="after 0 of 2 other layers"):
        last.impl.forward(
            last, states, states, states, last.kv_cache, metadata, states.clone()
        )


def test_nothing_is_measured_for_recent() -> None:
    """Its pages have no tail: writing one would damage the next page."""
    shape = Shape(num_layers=1, options={"policy": "recent"})
    rig = Rig(shape)
    run_ragged(rig, [50, 90], 3)
    rig = Rig(replace(shape, layout=RocoBackend.supported_kv_cache_layouts()[1]))
    run_ragged(rig, [50, 90], 3)
