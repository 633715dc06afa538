# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from vllm_roco import reference
from vllm_roco.kv_cache import page
from vllm_roco.ops.move_blocks import WORDS, first_pages, move_blocks


def caches(
    device: torch.device, layers: int = 3, **overrides: int | bool
) -> list[torch.Tensor]:
    """Return caches of which every byte differs from the next page's."""
    shape = {"num_blocks": 9, "num_kv_heads": 2, "block_size": 16, "head_size": 32}
    result = []
    for layer in range(layers):
        cache = reference.paged_cache(
            dtype=torch.float16,
            device=device,
            **(shape | overrides),  # type: ignore[arg-type]
        )
        pages = page.page_view(cache).view(torch.int16)
        pages.copy_(torch.arange(pages.numel()).view_as(pages) + layer)
        result.append(cache)
    return result


def bits(cache: torch.Tensor) -> torch.Tensor:
    return page.page_view(cache).view(torch.int16).clone()


def check(layers: list[torch.Tensor], moves: list[list[tuple[int, int]]]) -> None:
    device = layers[0].device
    expected = [bits(cache) for cache in layers]
    for source, target in (pair for row in moves for pair in row):
        for pages in expected:
            pages[target] = pages[source]
    width = max(map(len, moves)) + 1
    # what lies behind a row's moves must not be followed
    padded = [[*row, *[(0, 1)] * (width - len(row))] for row in moves]
    move_blocks(
        first_page_of_layer=first_pages(layers),
        moves=torch.tensor(padded, dtype=torch.int32, device=device),
        num_moves=torch.tensor(
            [len(row) for row in moves], dtype=torch.int32, device=device
        ),
        page_bytes=layers[0].stride(0) * layers[0].element_size(),
    )
    for cache, pages in zip(layers, expected, strict=True):
        torch.testing.assert_close(bits(cache), pages, rtol=0, atol=0)


@pytest.mark.parametrize("token_major", [True, False], ids=["LBNHC", "LBHNC"])
def test_whole_pages_move_in_every_layer(
    token_major: bool, device: torch.device
) -> None:
    moves = [[(3, 5), (8, 2)], [], [(7, 6)]]
    check(caches(device, token_major=token_major), moves)


def test_nothing_to_move(device: torch.device) -> None:
    check(caches(device), [[], []])


def test_pages_longer_than_one_copy(device: torch.device) -> None:
    layers = caches(device, layers=1, num_blocks=3, block_size=128, num_kv_heads=3)
    assert layers[0].stride(0) * 2 > 4 * WORDS
    check(layers, [[(2, 0)]])


def test_pages_of_different_size_are_refused(device: torch.device) -> None:
    layers = caches(device, layers=1) + caches(device, layers=1, block_size=32)
    with pytest.raises(ValueError, match="pages of one size"):
        first_pages(layers)
