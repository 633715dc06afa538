# SPDX-License-Identifier: Apache-2.0
"""The live keys, values and statistics of one sequence, and attention over them."""

import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass
class _Layer:
    """What one layer remembers; all float32.

    Attributes:
        keys: With their rotary position, [kv heads, live tokens, head size].
        values: [kv heads, live tokens, head size].
        mass_sum: Attention mass that each live block received (S1), [kv heads, blocks].
        mass_square_sum: Its squares (S2), [kv heads, blocks].
        mass_peak: Its largest value, [kv heads, blocks].
    """

    keys: torch.Tensor
    values: torch.Tensor
    mass_sum: torch.Tensor
    mass_square_sum: torch.Tensor
    mass_peak: torch.Tensor


class LiveSequence:
    """One sequence's live set: the same tokens in every layer and head.

    Use per step: `begin_step`, one `attend` per layer, then `drop_blocks` at most once.

    Attributes:
        positions: Positions of the live tokens in ascending order, int64 [live tokens].
        block_indices: Logical indices of the live blocks in ascending order, the last
            perhaps not full, int64 [blocks].
        queries_seen: Queries that saw each live block (C), int64 [blocks].
    """

    def __init__(self, block_size: int) -> None:
        self.positions = torch.empty(0, dtype=torch.int64)
        self.block_indices = torch.empty(0, dtype=torch.int64)
        self.queries_seen = torch.empty(0, dtype=torch.int64)
        self._block_size = block_size
        self._layers: dict[int, _Layer] = {}
        # of the step under way: [queries, live tokens] and [live tokens, blocks]
        self._visible = torch.empty(0, 0, dtype=torch.bool)
        self._membership = torch.empty(0, 0)

    @property
    def num_layers(self) -> int:
        """Layers that have attended so far."""
        return len(self._layers)

    def begin_step(self, step_positions: torch.Tensor) -> None:
        """Adds a step's own tokens to the live set.

        Args:
            step_positions: int64 [queries].
        """
        self.positions = torch.cat((self.positions, step_positions))
        self.block_indices, columns = torch.unique(
            self.positions // self._block_size, return_inverse=True
        )
        self._visible = self.positions <= step_positions[:, None]
        self._membership = F.one_hot(columns).float()
        sees_block = self._visible.float() @ self._membership > 0
        self.queries_seen = _widen(self.queries_seen, len(self.block_indices))
        self.queries_seen += sees_block.sum(dim=0)

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends over the live set, and adds what its blocks received.

        Args:
            layer_index: The layer's number.
            query: Rotated, float32 [query heads, queries, head size].
            key: The step's own, rotated, float32 [kv heads, queries, head size].
            value: The step's own, float32 [kv heads, queries, head size].
            scale: Factor on the logits.
            sinks: Of each query head a logit that takes its share of the probability
                and goes to no token, [query heads].

        Returns:
            float32 [queries, query heads, head size].
        """
        num_query_heads, num_queries, head_size = query.shape
        num_kv_heads, num_blocks = key.shape[0], len(self.block_indices)
        layer = self._layers.get(layer_index)
        if layer is None:
            empty = key.new_empty(num_kv_heads, 0)
            layer = _Layer(key[:, :0], value[:, :0], empty, empty, empty)
            self._layers[layer_index] = layer
        layer.keys = torch.cat((layer.keys, key), dim=1)
        layer.values = torch.cat((layer.values, value), dim=1)

        # query heads are grouped by kv head: [kv heads, group, queries, live tokens]
        grouped = query.reshape(num_kv_heads, -1, head_size)
        logits = (grouped @ layer.keys.transpose(1, 2) * scale).reshape(
            num_kv_heads, -1, num_queries, len(self.positions)
        )
        logits.masked_fill_(~self._visible, -torch.inf)
        if sinks is not None:
            of_sinks = sinks.reshape(num_kv_heads, -1, 1, 1)
            logits = torch.cat((logits, of_sinks.expand(-1, -1, num_queries, 1)), -1)
        probabilities = logits.softmax(dim=-1)[..., : len(self.positions)]
        output = probabilities.flatten(1, 2) @ layer.values

        mass = self.block_mass(probabilities)
        layer.mass_sum = _widen(layer.mass_sum, num_blocks) + mass.sum(dim=1)
        layer.mass_square_sum = _widen(
            layer.mass_square_sum, num_blocks
        ) + mass.square().sum(dim=1)
        layer.mass_peak = torch.maximum(
            _widen(layer.mass_peak, num_blocks), mass.amax(dim=1)
        )
        return output.reshape(num_query_heads, num_queries, head_size).transpose(0, 1)

    def block_mass(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Sums probabilities over each block's tokens, averaged over a kv head's group.

        Args:
            probabilities: float32 [kv heads, group, queries, live tokens].

        Returns:
            a(q, b), float32 [kv heads, queries, blocks].
        """
        return probabilities.mean(dim=1) @ self._membership

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns S1, S2 and the peaks, each float32 [layers * kv heads, blocks]."""
        layers = self._layers.values()
        return (
            torch.cat([layer.mass_sum for layer in layers]),
            torch.cat([layer.mass_square_sum for layer in layers]),
            torch.cat([layer.mass_peak for layer in layers]),
        )

    def distances(self, num_blocks: int) -> torch.Tensor:
        """Returns how far the mean value of each full block lies from all values' mean.

        Args:
            num_blocks: Full blocks, which are the first ones.

        Returns:
            float32 [layers * kv heads, num_blocks].
        """
        full = num_blocks * self._block_size
        rows = []
        for layer in self._layers.values():
            for values in layer.values[:, :full]:
                centre = values.mean(0)
                blocks = values.split(self._block_size)
                rows.append(
                    [float((block.mean(0) - centre).norm()) for block in blocks]
                )
        return torch.tensor(rows)

    def drop_blocks(self, victims: tuple[int, ...]) -> None:
        """Forgets blocks: keys, values and statistics, in every layer.

        Args:
            victims: Logical indices.
        """
        gone = torch.tensor(victims)
        token_stays = ~torch.isin(self.positions // self._block_size, gone)
        block_stays = ~torch.isin(self.block_indices, gone)
        self.positions = self.positions[token_stays]
        self.block_indices = self.block_indices[block_stays]
        self.queries_seen = self.queries_seen[block_stays]
        for layer in self._layers.values():
            layer.keys = layer.keys[:, token_stays]
            layer.values = layer.values[:, token_stays]
            layer.mass_sum = layer.mass_sum[:, block_stays]
            layer.mass_square_sum = layer.mass_square_sum[:, block_stays]
            layer.mass_peak = layer.mass_peak[:, block_stays]


def _widen(values: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Appends zeros for the blocks that are new, along the last dimension."""
    return F.pad(values, (0, num_blocks - values.shape[-1]))
