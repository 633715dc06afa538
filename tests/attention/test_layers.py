# SPDX-License-Identifier: Apache-2.0
"""Which layer closes a step, and which layers are refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.attention.rig import config_for
from tests.kv_cache.specs import roco_spec
from tests.refusals.cases import Case, refused
from vllm_roco.attention.backend import RocoBackend
from vllm_roco.attention.cpu.metadata import RocoCpuMetadataBuilder
from vllm_roco.attention.layers import LayerGroup, refuse_head_size
from vllm_roco.kv_cache.spec import RocoSpec

OPTIONS = {"budget": 64, "stride": 32, "chunk": 64, "sink": 16, "recent": 16}


@pytest.fixture
def vllm_config() -> VllmConfig:
    return config_for(OPTIONS)


def build(
    vllm_config: VllmConfig, name: str, num_heads: int = 4, **options: Any
) -> Attention:
    with set_current_vllm_config(vllm_config):
        return Attention(num_heads, 64, 0.125, 2, prefix=name, **options)


def name_of(index: int) -> str:
    return f"model.layers.{index}.self_attn.attn"


def test_the_last_layer_is_the_one_with_the_largest_index(
    vllm_config: VllmConfig,
) -> None:
    """Not the last by name: layer 10 comes behind layer 9."""
    names = [name_of(index) for index in (10, 2, 9, 0)]
    for name in names:
        build(vllm_config, name)
    group = LayerGroup(names, vllm_config)
    assert len(group) == 4
    assert group.last == name_of(10)


def profile(layers: Iterable[Attention]) -> None:
    """Run layers as vLLM does before there are caches."""
    for layer in layers:
        query = torch.ones(3, 4, 64)
        layer.impl.forward(layer, query, query, query, None, None, query)
        assert not query.any()


def test_who_decides_must_be_the_last_to_run(vllm_config: VllmConfig) -> None:
    """On CUDA it would have decided by what the step before left; a CPU told at the
    first request."""
    layers = [build(vllm_config, name_of(index)) for index in range(4)]
    names = [name_of(index) for index in range(3)]
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (3, 0, 1, 2)):
        profile(layers[index] for index in order)
        assert LayerGroup(names, vllm_config).last == name_of(2)
    profile(layers[index] for index in (0, 2, 1, 3))
    message = r"'model.layers.1.self_attn.attn' runs behind layer 'model.layers.2"
    with pytest.raises(NotImplementedError, match=message):
        LayerGroup(names, vllm_config)
    assert LayerGroup([name_of(0), name_of(2)], vllm_config).last == name_of(2)


def test_a_group_has_only_its_own_layers(vllm_config: VllmConfig) -> None:
    layers = [build(vllm_config, name_of(index)) for index in range(4)]
    group = LayerGroup([name_of(1), name_of(0)], vllm_config)
    for layer in layers:
        layer.kv_cache = torch.zeros(1)
    assert group.last == name_of(1)
    first, second = group.kv_caches()
    assert first is layers[0].kv_cache
    assert second is layers[1].kv_cache


def test_caches_are_those_bound_now(vllm_config: VllmConfig) -> None:
    layer = build(vllm_config, name_of(0))
    group = LayerGroup([name_of(0)], vllm_config)
    for _ in range(2):
        layer.kv_cache = torch.zeros(1)
        assert group.kv_caches()[0] is layer.kv_cache


def test_different_numbers_of_query_heads_are_refused(vllm_config: VllmConfig) -> None:
    build(vllm_config, name_of(0), 4)
    build(vllm_config, name_of(1), 8)
    with pytest.raises(NotImplementedError, match=r"query heads \(\[4, 8\]\)"):
        LayerGroup([name_of(0)], vllm_config)


def test_layers_of_another_backend_do_not_count(vllm_config: VllmConfig) -> None:
    build(vllm_config, name_of(0), 4)
    stock = AttentionBackendEnum.CPU_ATTN.get_class()
    build(vllm_config, name_of(1), 8, attn_backend=stock)
    assert LayerGroup([name_of(0)], vllm_config).last == name_of(0)


def test_the_builder_refuses_another_spec(vllm_config: VllmConfig) -> None:
    build(vllm_config, name_of(0))
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32
    )
    with pytest.raises(NotImplementedError, match="with a FullAttentionSpec are not"):
        RocoCpuMetadataBuilder(spec, [name_of(0)], vllm_config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"alibi_slopes": [0.5] * 4}, "ALiBi", id="ALiBi"),
        pytest.param(
            {"attn_type": AttentionType.ENCODER_ONLY},
            "attention type AttentionType.ENCODER_ONLY not supported",
            id="encoder",
        ),
        pytest.param(
            {"kv_sharing_target_layer_name": name_of(0)},
            "sharing the KV cache of layer 'model.layers.0.self_attn.attn'",
            id="sharing",
        ),
        pytest.param({"unheard": 3}, "the layer option unheard", id="unknown"),
    ],
)
def test_a_layer_that_cannot_be_bounded_is_refused(
    vllm_config: VllmConfig, options: dict[str, Any], message: str
) -> None:
    """By the backend's announcement or by the layer, before anything is served."""
    build(vllm_config, name_of(0))
    with pytest.raises((NotImplementedError, ValueError)) as error:
        build(vllm_config, name_of(1), **options)
    assert str(error.value).startswith("roco: ")
    assert message in str(error.value)


def test_values_of_another_size_than_keys_are_refused(vllm_config: VllmConfig) -> None:
    """A page was cut in two halves as if both had the same size."""
    layer = build(vllm_config, name_of(0), head_size_v=32)
    with pytest.raises(NotImplementedError, match="head_size_v = 32, head_size = 64"):
        RocoBackend.customize_spec(layer.get_kv_cache_spec(vllm_config))


def test_a_layer_option_of_none_is_no_option(vllm_config: VllmConfig) -> None:
    build(vllm_config, name_of(0), sinks=None)


def test_looking_back_no_chunk_is_no_option(vllm_config: VllmConfig) -> None:
    """Rnj-1 was refused for it, in its layers of full attention."""
    build(vllm_config, name_of(0), chunk_lookback=-1)
    with pytest.raises(AssertionError, match="requires the Triton backend"):
        build(vllm_config, name_of(1), chunk_lookback=1)


@pytest.mark.parametrize(
    ("head_size", "is_refused"),
    [(8, True), (16, False), (80, False), (100, True), (256, False), (512, True)],
)
def test_heads_without_a_kernel_on_cuda_are_refused(
    head_size: int, is_refused: bool
) -> None:
    """Those of Gemma 4's layers of full attention have 512 numbers."""
    if not is_refused:
        refuse_head_size(head_size)
        return
    with pytest.raises(NotImplementedError) as error:
        refuse_head_size(head_size)
    says = (f"head_size = {head_size}", "16 to 256", "another --attention-backend")
    refused(str(error.value), Case(says))


def test_a_layers_spec_becomes_rocos(vllm_config: VllmConfig) -> None:
    layer = build(vllm_config, name_of(0))
    spec = RocoBackend.customize_spec(layer.get_kv_cache_spec(vllm_config))
    assert type(spec) is RocoSpec
    assert (spec.budget, spec.stride, spec.chunk) == (64, 32, 64)
    assert spec.block_size == vllm_config.cache_config.block_size
    assert spec.max_steps_in_flight == vllm_config.max_concurrent_batches
    assert spec.has_statistics


def test_other_kinds_of_specs_are_left_alone() -> None:
    spec = roco_spec()
    assert RocoBackend.customize_spec(spec) is spec
