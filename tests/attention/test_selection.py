# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a layer when ROCO was named."""

from __future__ import annotations

import copy
import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, Platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig, get_attn_backend

import vllm_roco
from tests.attention.rig import config_for
from vllm_roco.attention.backend import RocoBackend
from vllm_roco.attention.selection import Chooser
from vllm_roco.validation import validated_config

OPTIONS = {"budget": 64, "stride": 32, "chunk": 64, "sink": 16, "recent": 16}

vllm_roco.register()
ROCO = AttentionBackendEnum["ROCO"]


@pytest.fixture(scope="module")
def hopper() -> type[Platform]:
    """vLLM's own CUDA platform, for a GPU that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        # its module loads the kernels, which no choice needs
        for name in ("vllm._C_stable_libtorch", "vllm._C"):
            patch.setitem(sys.modules, name, ModuleType(name))
        cuda = importlib.import_module("vllm.platforms.cuda")

    class HopperPlatform(cuda.CudaPlatformBase):  # type: ignore[misc,name-defined]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

    return HopperPlatform


@pytest.fixture
def vllm_config() -> VllmConfig:
    return config_for(OPTIONS)


def layer(**changes: Any) -> AttentionSelectorConfig:
    return AttentionSelectorConfig(
        head_size=64,
        dtype=torch.bfloat16,
        kv_cache_dtype="auto",
        block_size=None,
        attn_type=AttentionType.DECODER,
    )._replace(**changes)


def choose(platform: Any, config: VllmConfig, of: AttentionSelectorConfig) -> type:
    with set_current_vllm_config(config):
        return resolve_obj_by_qualname(platform.get_attn_backend_cls(ROCO, of))


def test_full_attention_is_rocos(
    vllm_config: VllmConfig, hopper: type[Platform]
) -> None:
    for platform in (current_platform, hopper):
        assert choose(platform, vllm_config, layer()) is RocoBackend


def test_a_window_is_left_to_vllm_on_a_cpu(vllm_config: VllmConfig) -> None:
    of = layer(has_sliding_window=True)
    assert choose(current_platform, vllm_config, of) is CPUAttentionBackend


@pytest.mark.parametrize("has_sink", [False, True])
def test_a_window_gets_vllms_own_choice_on_cuda(
    vllm_config: VllmConfig,
    hopper: type[Platform],
    monkeypatch: pytest.MonkeyPatch,
    has_sink: bool,
) -> None:
    """Whatever that is: it is asked with all that is known of the layer."""
    stock = AttentionBackendEnum.TRITON_ATTN.get_class()
    of = layer(has_sliding_window=True, has_sink=has_sink)
    asked = []

    def stock_choice(
        backend: AttentionBackendEnum | None, config: AttentionSelectorConfig
    ) -> str:
        asked.append((backend, config))
        return AttentionBackendEnum.TRITON_ATTN.get_path()

    monkeypatch.setattr(current_platform, "get_attn_backend_cls", stock_choice)
    assert choose(hopper, vllm_config, of) is stock
    assert asked == [(None, of)]


@pytest.mark.parametrize(
    "changes",
    [
        {"use_mla": True},
        {"use_sparse": True},
        {"attn_type": AttentionType.ENCODER_ONLY},
        {"attn_type": AttentionType.ENCODER_DECODER},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("window", [False, True])
def test_other_kinds_are_refused_by_name(
    vllm_config: VllmConfig,
    hopper: type[Platform],
    changes: dict[str, Any],
    window: bool,
) -> None:
    """Nobody may take a model for bounded of which RoCo sees nothing."""
    of = layer(has_sliding_window=window, **changes)
    for platform in (current_platform, hopper):
        with pytest.raises(ValueError, match="not supported"):
            choose(platform, vllm_config, of)


def test_who_names_a_backend_for_windows_gets_it(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then vLLM does not ask RoCo."""
    named = {"sliding_window": AttentionBackendEnum.CPU_ATTN}
    monkeypatch.setattr(vllm_config.attention_config, "backend_per_kind", named)
    with set_current_vllm_config(vllm_config):
        backends = [
            get_attn_backend(64, torch.float32, "auto", has_sliding_window=window)
            for window in (False, True)
        ]
    assert backends == [RocoBackend, CPUAttentionBackend]


def test_a_choice_is_of_one_layer_alone(vllm_config: VllmConfig) -> None:
    windowed, plain = ROCO.get_class(), ROCO.get_class()
    assert isinstance(windowed, Chooser)
    capability = DeviceCapability(9, 0)
    with set_current_vllm_config(vllm_config):
        for chooser, window in ((windowed, True), (plain, False)):
            reasons = chooser.validate_configuration(
                device_capability=capability,
                **layer(has_sliding_window=window)._asdict(),
            )
            assert not reasons
    assert windowed.full_cls_name() == CPUAttentionBackend.full_cls_name()
    assert plain.full_cls_name() == RocoBackend.full_cls_name()


def test_what_else_is_asked_of_the_backend_is_answered(
    vllm_config: VllmConfig,
) -> None:
    assert ROCO.get_class().get_name() == "ROCO"
    assert ROCO.get_class().get_builder_cls() is RocoBackend.get_builder_cls()


def test_a_window_in_every_layer_is_refused(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_config.cache_config, "sliding_window", 128)
    with pytest.raises(NotImplementedError, match="every layer .* window of 128"):
        choose(current_platform, vllm_config, layer(has_sliding_window=True))


def test_it_is_refused_behind_a_model_that_was_served(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM remembers who serves a layer, and a later engine of the process ran on.

    Front ends and platforms read the configuration of every engine.
    """

    def ask() -> type:
        with set_current_vllm_config(vllm_config):
            return get_attn_backend(64, torch.float32, "auto", has_sliding_window=True)

    assert ask() is CPUAttentionBackend
    cache_config = copy.copy(vllm_config.cache_config)
    monkeypatch.setattr(vllm_config, "cache_config", cache_config)
    monkeypatch.setattr(cache_config, "sliding_window", 128)
    assert ask() is CPUAttentionBackend
    with pytest.raises(NotImplementedError, match="every layer .* window of 128"):
        validated_config(vllm_config)
