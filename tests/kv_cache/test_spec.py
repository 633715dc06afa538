# SPDX-License-Identifier: Apache-2.0
"""What vLLM plans with, through vLLM's own planning."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tests.configs import engine_config
from tests.kv_cache.planning import get_kv_cache_groups, plan_kv_cache
from tests.kv_cache.specs import roco_spec
from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache import spec as spec_module
from vllm_roco.kv_cache.manager import RocoManager
from vllm_roco.kv_cache.page import statistics_bytes
from vllm_roco.kv_cache.spec import RocoSpec

OPTIONS = {"budget": 64, "stride": 32, "chunk": 64, "sink": 16, "recent": 16}


@pytest.fixture(scope="module")
def planning_config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    """The configuration of an engine for sequences far beyond the budget."""
    return engine_config(
        tmp_path_factory.mktemp("model"),
        OPTIONS,
        max_model_len=4096,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        block_size=16,
    )


@pytest.fixture
def vllm_config(planning_config: VllmConfig) -> VllmConfig:
    """A copy that a test may change."""
    config = copy.deepcopy(planning_config)
    # the engine core resolves it from what every layer's backend accepts
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def full_spec(spec: RocoSpec) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=spec.dtype,
    )


def sliding_spec(spec: RocoSpec) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=spec.dtype,
        sliding_window=32,
    )


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 9])
@pytest.mark.parametrize("block_size", [16, 128])
def test_the_page_pays_for_its_statistics(num_kv_heads: int, block_size: int) -> None:
    spec = roco_spec(num_kv_heads=num_kv_heads, block_size=block_size)
    states = num_kv_heads * block_size * 2 * spec.head_size * 4
    assert spec.page_size_bytes == states + statistics_bytes(num_kv_heads)


def test_a_page_without_statistics_is_of_the_ordinary_size() -> None:
    spec = roco_spec(policy="recent")
    assert spec.page_size_bytes == full_spec(spec).page_size_bytes


def test_everything_else_is_as_vllm_planned_the_layer() -> None:
    spec = roco_spec(dtype=torch.bfloat16, head_size=80)
    full = replace(full_spec(spec), max_tp_shards=2)
    roco = RocoSpec.from_attention_spec(full, RocoConfig(policy="recent"), 1)
    assert (roco.num_kv_heads, roco.head_size, roco.max_tp_shards) == (2, 80, 2)
    assert roco.dtype == torch.bfloat16
    assert roco.page_size_bytes == full.page_size_bytes


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("how", ["copy_with_new_block_size", "replace"])
def test_larger_blocks_have_larger_pages(block_size: int, how: str) -> None:
    """vLLM enlarges blocks so that the pages of different layers match."""
    spec = roco_spec(budget=256, stride=64, chunk=64)
    if how == "replace":
        changed = replace(spec, block_size=block_size)
    else:
        changed = spec.copy_with_new_block_size(block_size)
    assert changed == roco_spec(block_size=block_size, budget=256, stride=64, chunk=64)
    assert changed.schedule.budget_blocks * block_size == 256
    assert changed.schedule.stride_blocks * block_size == 64


@pytest.mark.parametrize("option", ["budget", "stride", "chunk"])
def test_blocks_that_vllm_enlarges_are_checked(option: str) -> None:
    """The options fitted blocks of 16 tokens, then vLLM doubled them: the stride became
    0 blocks, and the engine divided by it."""
    spec = roco_spec(**{"budget": 64, "stride": 64, "chunk": 64, option: 112})
    with pytest.raises(ValueError, match=f"{option} = 112 .* block size .32 tokens"):
        spec.copy_with_new_block_size(32)


def test_padding_that_vllm_asked_for_is_kept() -> None:
    spec = roco_spec()
    padded = replace(spec, page_size_padded=spec.page_size_bytes + 384)
    assert padded.page_size_bytes == spec.page_size_bytes + 384


def test_padding_that_leaves_no_room_for_statistics_is_raised() -> None:
    spec = roco_spec()
    padded = replace(spec, page_size_padded=full_spec(spec).page_size_bytes)
    assert padded.page_size_bytes == spec.page_size_bytes


def test_equal_specs_merge_into_one() -> None:
    assert RocoSpec.merge([roco_spec(), roco_spec()]) == roco_spec()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(roco_spec(budget=128), id="budget"),
        pytest.param(roco_spec(num_kv_heads=4), id="heads"),
        pytest.param(full_spec(roco_spec()), id="full attention"),
    ],
)
def test_different_specs_do_not_merge(other: Any) -> None:
    with pytest.raises(AssertionError, match="must have the same spec"):
        RocoSpec.merge([roco_spec(), other])


def test_a_spec_survives_the_way_to_another_process() -> None:
    spec = roco_spec(max_steps_in_flight=2)
    loaded = pickle.loads(pickle.dumps(spec))
    assert loaded == spec
    assert type(loaded) is RocoSpec
    assert loaded.page_size_bytes == spec.page_size_bytes
    assert loaded.schedule == spec.schedule


def test_vllm_makes_the_manager_of_the_spec() -> None:
    assert KVCacheSpecRegistry.get_manager_class(roco_spec()) is RocoManager


def test_vllms_own_specs_keep_their_managers() -> None:
    spec = roco_spec()
    for other in (full_spec(spec), sliding_spec(spec)):
        manager = KVCacheSpecRegistry.get_manager_class(other)
        assert manager is not None
        assert not issubclass(manager, RocoManager)


def test_roco_layers_form_one_group(vllm_config: VllmConfig) -> None:
    specs: dict[str, KVCacheSpec] = {f"layers.{i}": roco_spec() for i in range(3)}
    (group,) = get_kv_cache_groups(vllm_config, specs)
    assert group.layer_names == list(specs)
    assert group.kv_cache_spec == roco_spec()


@pytest.mark.parametrize("make_other", [full_spec, sliding_spec])
def test_roco_layers_never_share_a_group_with_others(
    vllm_config: VllmConfig, make_other: Any
) -> None:
    """Only the group with the budget may lose blocks."""
    spec = roco_spec(budget=512, stride=256, chunk=512)
    specs: dict[str, KVCacheSpec] = {}
    for layer in range(2):
        specs[f"layers.{2 * layer}"] = spec
        specs[f"layers.{2 * layer + 1}"] = make_other(spec)
    groups = get_kv_cache_groups(vllm_config, specs)
    assert len(groups) == 2
    for group in groups:
        own = isinstance(group.kv_cache_spec, RocoSpec)
        assert all(
            isinstance(specs[name], RocoSpec) == own for name in group.layer_names
        )


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_the_bytes_of_a_sequence_are_the_bound_on_its_blocks(
    vllm_config: VllmConfig, steps_in_flight: int
) -> None:
    spec = roco_spec(max_steps_in_flight=steps_in_flight)
    # B + S + k * chunk + 1 in blocks
    blocks = 4 + 2 + steps_in_flight * 4 + 1
    assert spec.max_blocks_per_sequence == blocks
    assert spec.max_memory_usage_bytes(vllm_config) == blocks * spec.page_size_bytes


@pytest.mark.parametrize(
    ("max_model_len", "blocks"),
    [(1, 1), (16, 1), (17, 2), (160, 10), (176, 11), (177, 11)],
)
def test_a_short_sequence_needs_no_more_than_its_length(
    vllm_config: VllmConfig, max_model_len: int, blocks: int
) -> None:
    """Nothing of it is stored: vLLM varies the length when it fits it to memory."""
    spec = roco_spec()
    vllm_config.model_config.max_model_len = max_model_len
    assert spec.max_memory_usage_bytes(vllm_config) == blocks * spec.page_size_bytes
    vllm_config.model_config.max_model_len = 4096
    assert spec.max_memory_usage_bytes(vllm_config) == 11 * spec.page_size_bytes


@pytest.mark.parametrize(
    ("mode", "blocks"),
    [
        # B + S + chunk + 1 in blocks
        ("both", 4 + 2 + 4 + 1),
        ("auto", 4 + 2 + 4 + 1),
        # the budget and the longest prompt that is served
        ("generation", 16 + 2 + 4 + 1),
        # all tokens of the longest sequence
        ("prompt", 256),
        ("full", 256),
    ],
)
def test_the_bytes_of_a_sequence_are_those_of_the_servers_mode(
    vllm_config: VllmConfig, mode: str, blocks: int
) -> None:
    options = {**OPTIONS, "max_budget": 256, "allow_full": True, "mode": mode}
    vllm_config.additional_config = {"roco": options}
    spec = roco_spec()
    for max_model_len, most in ((4096, blocks), (160, min(10, blocks)), (1, 1)):
        vllm_config.model_config.max_model_len = max_model_len
        taken = spec.max_memory_usage_bytes(vllm_config)
        assert taken == most * spec.page_size_bytes


def plan(
    vllm_config: VllmConfig, num_blocks: int, dtype: torch.dtype = torch.float32
) -> KVCacheConfig:
    """Plan the memory of so many blocks of float32."""
    spec = roco_spec(dtype=dtype)
    specs: dict[str, KVCacheSpec] = {"layers.0": spec, "layers.1": spec}
    memory = num_blocks * 2 * roco_spec().page_size_bytes
    return plan_kv_cache(vllm_config, specs, memory)


def test_one_sequence_of_any_length_fits_in_its_bound(vllm_config: VllmConfig) -> None:
    # 256 blocks would be needed without a budget; one is vLLM's null block
    assert plan(vllm_config, 12).num_blocks == 12
    with pytest.raises(ValueError, match="To serve at least one request"):
        plan(vllm_config, 11)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {},
            (
                "up to 176 tokens: budget = 64, stride = 32, chunk = 64",
                "Lower budget,",
            ),
        ),
        (
            {"mode": "generation", "max_budget": 128},
            (
                "up to 240 tokens: max_budget = 128, stride = 32",
                "Lower max_budget, ",
            ),
        ),
        (
            {"mode": "full", "allow_full": True},
            ("keeps all that it generates in mode = 'full'", "Lower --max-model-len"),
        ),
    ],
)
def test_a_cache_too_small_for_one_sequence_names_our_options(
    vllm_config: VllmConfig,
    said: list[str],
    options: dict[str, Any],
    says: tuple[str, ...],
) -> None:
    """vLLM's own error advised a smaller `max_model_len`, which changes nothing."""
    vllm_config.additional_config = {"roco": OPTIONS | options}
    with pytest.raises(ValueError, match="To serve at least one"):
        plan(vllm_config, 9)
    (message,) = said
    assert message.startswith("roco: the KV cache is too small for one sequence, ")
    for words in says:
        assert words in message


@pytest.mark.parametrize(
    ("options", "lower", "helps"),
    [
        ({"chunk": 32}, "Lower --max-num-batched-tokens, then budget, chunk or", 159),
        ({}, "Lower budget, chunk or stride, then --max-num-batched-tokens, or", 176),
        ({"mode": "full", "allow_full": True}, "--max-num-batched-tokens, use", None),
    ],
)
def test_layers_with_a_window_may_be_what_does_not_fit(
    vllm_config: VllmConfig,
    said: list[str],
    options: dict[str, Any],
    lower: str,
    helps: int | None,
) -> None:
    """The budget was blamed, though batches in flight took most of the cache."""
    vllm_config.additional_config = {"roco": OPTIONS | options}
    vllm_config.model_config.hf_text_config.sliding_window = 32
    specs = {
        "full": roco_spec(**OPTIONS | options),
        "windowed": sliding_spec(roco_spec()),
    }
    # enough for what is kept in either layer, but not in both
    with pytest.raises(ValueError, match="To serve at least one"):
        plan_kv_cache(vllm_config, specs, 16 * roco_spec().page_size_bytes)
    (message,) = said
    # a window of 32 less one, and a batch of 128
    assert (
        "in layers with a window it may hold up to 159 tokens: the window, " in message
    )
    assert lower in message
    assert helps is None or f"helps only below {helps} tokens" in message


def test_nothing_is_said_of_a_cache_that_is_large_enough(
    vllm_config: VllmConfig, said: list[str]
) -> None:
    """Nor where vLLM fits the length to the cache, which asks for one token too."""
    plan(vllm_config, 12)
    vllm_config.model_config.original_max_model_len = -1
    plan(vllm_config, 9)
    assert said == []


def test_one_token_may_be_all_that_is_asked_for(
    tmp_path: Path, said: list[str]
) -> None:
    """`--max-model-len 1` was told that its cache was too small."""
    config = engine_config(tmp_path, OPTIONS, max_model_len=1, max_num_seqs=4)
    config.cache_config.kv_cache_layout = "LBHNC"
    assert plan(config, 3).num_blocks == 3
    assert said == []


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told as an error, also if another test has heard it before."""
    errors: list[str] = []
    monkeypatch.setattr(
        spec_module.logger, "error_once", lambda text, *of: errors.append(text % of)
    )
    return errors


def test_maximum_concurrency_counts_by_the_bound(vllm_config: VllmConfig) -> None:
    planned = plan(vllm_config, 111)
    concurrency = get_max_concurrency_for_kv_cache_config(vllm_config, planned)
    assert concurrency == pytest.approx(10, abs=0.2)


def test_an_fp8_cache_holds_what_its_pages_say(vllm_config: VllmConfig) -> None:
    """Half of bfloat16's K and V, and statistics that are as large as ever.

    16 tokens of 8 heads of 128 numbers: about twice as many sequences.
    """
    of_a_model: dict[str, Any] = dict(num_kv_heads=8, head_size=128)
    pages = [
        roco_spec(dtype=dtype, **of_a_model).page_size_bytes
        for dtype in (torch.bfloat16, torch.uint8)
    ]
    tail = statistics_bytes(8)
    assert pages == [64 * 1024 + tail, 32 * 1024 + tail]
    concurrency = [
        get_max_concurrency_for_kv_cache_config(
            vllm_config, plan(vllm_config, 1000, dtype)
        )
        for dtype in (torch.bfloat16, torch.uint8)
    ]
    small = roco_spec(dtype=torch.bfloat16), roco_spec(dtype=torch.uint8)
    assert concurrency[1] / concurrency[0] == pytest.approx(
        small[0].page_size_bytes / small[1].page_size_bytes, rel=0.02
    )


@pytest.mark.parametrize(
    ("asynchronous", "name"), [(False, "RocoScheduler"), (True, "RocoAsyncScheduler")]
)
def test_planning_puts_the_scheduler_in_place(
    vllm_config: VllmConfig, asynchronous: bool, name: str
) -> None:
    vllm_config.scheduler_config.async_scheduling = asynchronous
    plan(vllm_config, 100)
    assert vllm_config.scheduler_config.get_scheduler_cls().__name__ == name


def test_planning_refuses_a_scheduler_that_ends_no_chunks(
    vllm_config: VllmConfig,
) -> None:
    vllm_config.scheduler_config.scheduler_cls = (
        "vllm.v1.core.sched.scheduler.Scheduler"
    )
    with pytest.raises(
        ValueError, match="does not end prompt chunks where RoCo evicts"
    ):
        plan(vllm_config, 100)
