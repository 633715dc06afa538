# SPDX-License-Identifier: Apache-2.0
"""The layers of one KV cache group in one worker, and what a layer may not be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from vllm_roco.backend_name import BACKEND_NAME
from vllm_roco.kv_cache.spec import RocoSpec

logger = init_logger(f"vllm.{__name__}")

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionImpl, AttentionLayer
    from vllm.v1.kv_cache_interface import AttentionSpec


def roco_layers(vllm_config: VllmConfig) -> list[Attention]:
    """Return this worker's layers whose backend is RoCo, in the order of the model."""
    every = get_layers_from_vllm_config(vllm_config, Attention)
    return [x for x in every.values() if x.attn_backend.get_name() == BACKEND_NAME]


def describe_other_layers(vllm_config: VllmConfig) -> str | None:
    """Return who serves which of this worker's layers, None if RoCo serves all."""
    every = get_layers_from_vllm_config(vllm_config, Attention).values()
    others = {
        layer.attn_backend.get_name()
        for layer in every
        if layer.attn_backend.get_name() != BACKEND_NAME
    }
    if not others:
        return None
    return (
        f"RoCo keeps a budget in {len(roco_layers(vllm_config))} of {len(every)} "
        f"layers; the others have a sliding window and use {', '.join(sorted(others))}."
    )


class HasTurn(Protocol):
    """A layer's implementation, as far as it has seen when it runs: see `RocoImpl`."""

    turn: int


class LayerGroup:
    """The RoCo layers that share one block table, in the order of the model.

    Eviction is one decision for all of them, taken by the last layer once every layer's
    statistics of the step are in.

    Args:
        layer_names: Names as in `static_forward_context`.
        vllm_config: The worker's configuration.

    Raises:
        NotImplementedError: Layers differ in their number of query heads, for which
            vLLM would build several groups over one block table. Or they have run in
            another order.
    """

    def __init__(self, layer_names: Sequence[str], vllm_config: VllmConfig) -> None:
        every = get_layers_from_vllm_config(vllm_config, Attention)
        heads = sorted({layer.num_heads for layer in roco_layers(vllm_config)})
        if len(heads) > 1:
            raise NotImplementedError(
                f"roco: a model whose layers have different numbers of query heads "
                f"({heads}) is not supported. Use another --attention-backend."
            )
        if (others := describe_other_layers(vllm_config)) is not None:
            logger.info_once("%s", others)
        self._layers = [
            every[name] for name in sorted(layer_names, key=extract_layer_index)
        ]
        self._check_order()

    def _check_order(self) -> None:
        """Raise if the last layer was not the last one in vLLM's profiling run."""
        turns = [impl.turn for impl in cast("list[HasTurn]", self.implementations)]
        if max(turns) > turns[-1]:
            behind = self._layers[turns.index(max(turns))].layer_name
            raise NotImplementedError(
                f"roco: a model in which layer {behind!r} runs behind layer "
                f"{self.last!r} is not supported: what goes is decided by the layer "
                "with the largest number, once all have run. Use another "
                "--attention-backend."
            )

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def num_heads(self) -> int:
        """Query heads of each layer on this rank."""
        return int(self._layers[0].num_heads)

    @property
    def last(self) -> str:
        """Name of the layer that evicts, once all have attended."""
        return self._layers[-1].layer_name

    @property
    def implementations(self) -> list[AttentionImpl[Any]]:
        """The layers' implementations."""
        return [layer.impl for layer in self._layers]

    def kv_caches(self) -> list[torch.Tensor]:
        """Return the layers' caches as bound now.

        Not to be kept: vLLM binds throw-away caches while it profiles.
        """
        return [layer.kv_cache for layer in self._layers]


def name_of(layer: AttentionLayer) -> str:
    """Return a layer's name in `static_forward_context`."""
    return cast("Attention", layer).layer_name


def roco_spec(kv_cache_spec: AttentionSpec) -> RocoSpec:
    """Return the spec of a group whose layers are RoCo's.

    Raises:
        NotImplementedError: vLLM planned another kind of attention for the layers.
    """
    if not isinstance(kv_cache_spec, RocoSpec):
        raise NotImplementedError(
            f"roco: layers with a {type(kv_cache_spec).__name__} are not supported. "
            "Use another --attention-backend."
        )
    return kv_cache_spec


def refuse_head_size(head_size: int) -> None:
    """Refuse heads for which the kernels on CUDA are not written.

    Raises:
        NotImplementedError: They have too many or too few numbers, or no multiple of 8.
    """
    if head_size % 8 or not 16 <= head_size <= 256:
        raise NotImplementedError(
            f"roco: head_size = {head_size} is not supported on CUDA. Serve a "
            "model whose heads have 16 to 256 numbers, a multiple of 8, or use "
            "another --attention-backend."
        )


_NOTHING = {"chunk_lookback": -1}
"""Values of layer options that stand for none."""


def refuse_layer(
    alibi_slopes: object,
    sliding_window: int | None,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
    extra: dict[str, Any],
) -> None:
    """Refuse what a layer may ask of its attention implementation.

    The arguments are those of `AttentionImpl.__init__`.

    Raises:
        NotImplementedError: The layer cannot have its cache bounded.
    """

    def refuse(what: str, instead: str = "Use another --attention-backend") -> None:
        raise NotImplementedError(f"roco: {what} is not supported. {instead}.")

    if alibi_slopes is not None:
        refuse("ALiBi (a moved block's place no longer tells its position)")
    if sliding_window is not None:
        refuse(f"a sliding-window layer (sliding_window = {sliding_window})")
    if attn_type != AttentionType.DECODER:
        refuse(f"attention type {attn_type!r}")
    if kv_sharing_target_layer_name is not None:
        refuse(f"sharing the KV cache of layer {kv_sharing_target_layer_name!r}")
    for name, value in extra.items():
        if value is not None and value != _NOTHING.get(name):
            refuse(f"the layer option {name}")
