# SPDX-License-Identifier: Apache-2.0
"""After the warm-up no step needs a kernel that is not there; without a GPU.

`tests/gpu/test_no_compilation.py` serves requests on one.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils
from vllm.v1.kv_cache_interface import KVCacheLayout

from tests.attention.rig import config_for
from tests.compilations import ImaginedCompilation, imagined_compilations
from tests.kv_cache.specs import bind_caches, one_group, roco_spec
from vllm_roco.attention.backend import RocoBackend
from vllm_roco.attention.cuda import metadata, warmup
from vllm_roco.attention.cuda.eviction import CudaEviction
from vllm_roco.attention.cuda.metadata import RocoCudaMetadata, RocoCudaMetadataBuilder
from vllm_roco.ops.device import H100, Device

CPU = torch.device("cpu")
OPTIONS = {"budget": 1024, "stride": 256, "chunk": 1024}
MAX_NUM_SEQS = 128
NUM_BLOCKS = 8


@dataclass(frozen=True)
class Model:
    """What kernels are compiled for.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: Of queries, keys and values.
        dtype: Of the activations.
        is_fp8: Whether the cache holds bytes.
        scales_per_head: Whether its scales are one for each kv head.
        soft_cap: Of the scores.
        has_sinks: Whether there are attention sinks.
        options: Further options of RoCo.
    """

    num_heads: int = 9
    num_kv_heads: int = 3
    head_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    is_fp8: bool = False
    scales_per_head: bool = False
    soft_cap: float | None = None
    has_sinks: bool = False
    options: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "plain": Model(),
    "one head": Model(num_heads=1, num_kv_heads=1),
    "float32": Model(dtype=torch.float32),
    "fp8": Model(is_fp8=True),
    "fp8 in float32": Model(is_fp8=True, dtype=torch.float32),
    "fp8 by head": Model(is_fp8=True, scales_per_head=True),
    "sinks, soft cap": Model(has_sinks=True, soft_cap=30.0, dtype=torch.float16),
    "odd heads": Model(num_heads=5, num_kv_heads=1, head_size=72),
    "odd budget": Model(options={"max_budget": 1040, "allow_full": True}),
    "recent": Model(options={"policy": "recent"}),
}


@pytest.fixture
def impl_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers attend as on a GPU, but for what is vLLM's and no Triton kernel."""
    for name in (
        *("flash_attn_varlen_func", "get_scheduler_metadata"),
        "reshape_and_cache_flash",
    ):
        # a build for CPUs has none
        monkeypatch.setattr(fa_utils, name, None, raising=False)
    from vllm_roco.attention.cuda import impl

    monkeypatch.setattr(impl, "flash_attn_varlen_func", flash)
    monkeypatch.setattr(impl, "get_scheduler_metadata", lambda **_: torch.zeros(1))
    monkeypatch.setattr(impl, "get_flash_attn_version", lambda **_: 3)
    monkeypatch.setattr(impl, "scaled_fp8_quant", quantise)
    monkeypatch.setattr(metadata, "moved_blocks_of", lambda _: None)
    monkeypatch.setattr(Device, "of", lambda _: H100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(RocoBackend, "get_impl_cls", lambda: impl.RocoCudaImpl)


def flash(
    *, q: torch.Tensor, out: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    num_queries, num_heads, _head_size = q.shape
    return out, torch.zeros(num_heads, num_queries)


def quantise(
    query: torch.Tensor, scale: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.to(torch.float8_e4m3fn), scale


class Worker:
    """A group of two layers, and the buffers in which vLLM describes steps."""

    def __init__(self, model: Model) -> None:
        self.model = model
        options = {**OPTIONS, **model.options}
        spec = roco_spec(
            num_kv_heads=model.num_kv_heads,
            head_size=model.head_size,
            dtype=torch.uint8 if model.is_fp8 else model.dtype,
            **options,
        )
        plan = one_group(spec, NUM_BLOCKS, num_layers=2)
        (group,) = plan.kv_cache_groups
        self.config = config_of(model, options)
        self.registry = JitWarmupRegistry(self.config)
        sinks = torch.zeros(model.num_heads, dtype=model.dtype)
        with set_current_vllm_config(self.config), self.registry.activate():
            self.layers = [
                Attention(
                    model.num_heads,
                    model.head_size,
                    model.head_size**-0.5,
                    model.num_kv_heads,
                    cache_config=self.config.cache_config,
                    logits_soft_cap=model.soft_cap,
                    prefix=name,
                    sinks=sinks if model.has_sinks else None,
                )
                for name in group.layer_names
            ]
        self.bound = bind_caches(plan, KVCacheLayout.LBHNC)
        for layer, cache in zip(self.layers, self.bound, strict=True):
            layer.kv_cache = cache
            if model.scales_per_head:
                layer._k_scale = layer._v_scale = torch.ones(model.num_kv_heads)
        self.builder = RocoCudaMetadataBuilder(
            spec, group.layer_names, self.config, CPU
        )

        def int32(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32)

        # a width of which rows begin at any address
        self.block_table = int32(MAX_NUM_SEQS, 259)
        self.seq_lens = int32(MAX_NUM_SEQS)
        self.query_start_loc = int32(MAX_NUM_SEQS + 1)

    def built(self, sequences: list[tuple[int, int]]) -> RocoCudaMetadata:
        """Return a step's metadata.

        Args:
            sequences: Queries, and tokens before them, of each sequence.
        """
        num_reqs = len(sequences)
        queries, before = torch.tensor(sequences, dtype=torch.int32).unbind(1)
        self.query_start_loc[1 : num_reqs + 1] = queries.cumsum(0)
        self.seq_lens[:num_reqs] = queries + before
        num_tokens = int(queries.sum())
        start = self.query_start_loc[: num_reqs + 1]
        common = CommonAttentionMetadata(
            query_start_loc=start,
            query_start_loc_cpu=start.clone(),
            seq_lens=self.seq_lens[:num_reqs],
            num_reqs=num_reqs,
            num_actual_tokens=num_tokens,
            max_query_len=int(queries.max()),
            max_seq_len=int(self.seq_lens[:num_reqs].max()),
            block_table_tensor=self.block_table[:num_reqs],
            slot_mapping=torch.zeros(num_tokens, dtype=torch.int64),
        )
        return self.builder.build(0, common)

    def step(self, sequences: list[tuple[int, int]], *, beside_keys: bool) -> None:
        """Run a step.

        Args:
            sequences: As of `built`.
            beside_keys: Whether queries lie between keys and values.
        """
        built = self.built(sequences)
        num_tokens = sum(length for length, _ in sequences)
        model = self.model
        numbers = model.num_heads * model.head_size
        width = numbers + 2 * model.num_kv_heads * model.head_size * beside_keys
        query = torch.zeros(num_tokens, width, dtype=model.dtype)[:, :numbers]
        query = query.view(num_tokens, model.num_heads, model.head_size)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for layer in self.layers:
            layer.impl.forward(
                layer, query, query, query, layer.kv_cache, built, output
            )


def config_of(model: Model, options: dict[str, Any]) -> VllmConfig:
    config = config_for(options)
    config.model_config = copy.copy(config.model_config)
    config.model_config.dtype = model.dtype
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.cache_dtype = "fp8" if model.is_fp8 else "auto"
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.max_num_seqs = MAX_NUM_SEQS
    return config


@pytest.fixture
def compilations() -> Iterator[list[ImaginedCompilation]]:
    with imagined_compilations() as found:
        yield found


@pytest.mark.parametrize("name", MODELS)
def test_ragged_steps_find_every_kernel(
    name: str, impl_on_cpu: None, compilations: list[ImaginedCompilation]
) -> None:
    """The first prompt behind decodes, whose rows are not aligned, was compiled for."""
    worker = Worker(MODELS[name])
    worker.registry.warmup()
    prepared = list(compilations)
    some = random.Random(name)
    for num_decodes in range(MAX_NUM_SEQS + 1):
        num_prompts = min(some.randrange(4), MAX_NUM_SEQS - num_decodes)
        lengths = [1] * num_decodes + some.sample(range(2, 70), num_prompts)
        if lengths:
            sequences = [(length, some.randrange(3000)) for length in lengths]
            worker.step(sequences, beside_keys=some.random() < 0.5)
    assert compilations == prepared


def test_the_log_tells_how_many_kernels_there_are(
    impl_on_cpu: None,
    compilations: list[ImaginedCompilation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(warmup.logger, "info", lambda line, *by: told.append(line % by))
    # a second engine of a process finds the kernels of the first
    for worker in (Worker(MODELS["plain"]), Worker(MODELS["plain"])):
        worker.registry.warmup()
    assert [line.split(",")[0] for line in told] == [
        f"roco: {len(compilations)} kernels were compiled",
        "roco: 0 kernels were compiled",
    ]


def test_a_worker_without_caches_has_nothing_to_warm_up(
    impl_on_cpu: None, compilations: list[ImaginedCompilation]
) -> None:
    worker = Worker(MODELS["plain"])
    del worker.builder
    worker.registry.warmup()
    assert compilations == []


def test_the_warm_up_is_needed(
    impl_on_cpu: None, compilations: list[ImaginedCompilation]
) -> None:
    """Else the other test would compare nothing with nothing."""
    worker = Worker(MODELS["plain"])
    worker.step([(1, 70), (5, 3)], beside_keys=False)
    assert {found.kernel for found in compilations} == {
        "_live_table_kernel",
        "_deal_kernel",
        "attend_kernel",
        "combine_kernel",
        "_prefill_mass_kernel",
        "_score_kernel",
        "_contribution_kernel",
        "_select_kernel",
        "_move_blocks_kernel",
    }


def test_prompts_are_measured_by_as_many_programs_as_a_step_is_worth(
    impl_on_cpu: None, compilations: list[ImaginedCompilation]
) -> None:
    worker = Worker(Model(num_heads=8, num_kv_heads=2, head_size=128))
    alone = worker.built([(1024, 1000)])
    beside = worker.built([(1, 70), (1, 3), (1024, 1000)])
    many = worker.built([(1024, 1000)] * 20)
    splits = [step.prefills.plan.splits for step in (alone, beside, many)]
    # of 2,024 tokens two kv heads make 64 runs, where there is room for 396
    assert splits == [8, 8, 1]


class Recorded:
    """A launch of the first layer, asked to be made again."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.again_with: list[tuple[torch.Tensor | None, ...]] = []

    def again(self, *tensors: torch.Tensor | None) -> None:
        self.again_with.append(tensors)


@pytest.mark.parametrize("name", ["plain", "fp8", "sinks, soft cap", "recent"])
def test_later_layers_are_launched_as_the_first_was(
    name: str, impl_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their own cache, statistics, sinks and scales, in the launch's order."""
    launches: dict[str, list[Recorded]] = {"decode": [], "measure": []}

    def recording(kind: str) -> Any:
        def record(**arguments: Any) -> Recorded:
            launches[kind].append(Recorded(**arguments))
            return launches[kind][-1]

        return record

    from vllm_roco.attention.cuda import impl

    monkeypatch.setattr(impl, "decode_attention", recording("decode"))
    monkeypatch.setattr(impl, "measure_prefill", recording("measure"))
    schedules: list[dict[str, Any]] = []
    attended: list[dict[str, Any]] = []

    def schedule(**told: Any) -> torch.Tensor:
        schedules.append(told)
        return torch.full((1,), len(schedules))

    def attend(**told: Any) -> tuple[torch.Tensor, torch.Tensor]:
        attended.append(told)
        return flash(**told)

    monkeypatch.setattr(impl, "get_scheduler_metadata", schedule)
    monkeypatch.setattr(impl, "flash_attn_varlen_func", attend)
    monkeypatch.setattr(metadata.StepBuffers, "fill", lambda *_: None)
    dealt: list[torch.Tensor] = []
    monkeypatch.setattr(
        metadata.DecodeSplits, "deal", lambda _, lengths, plan: dealt.append(lengths)
    )
    monkeypatch.setattr(CudaEviction, "evict", lambda *_, **__: None)
    worker = Worker(MODELS[name])
    for _ in range(2):
        worker.step([(1, 70), (1, 3), (9, 3)], beside_keys=True)
    # worked out in the first layer of each step, and never kept for the next one
    measures = name != "recent"
    assert [len(found) for found in launches.values()] == [2, 2 * measures]
    # FlashAttention's layout of prompts likewise, from what attends
    assert len(schedules) == 2
    assert [int(told["scheduler_metadata"]) for told in attended] == [1, 1, 2, 2]
    same = {
        "max_seqlen_q": "max_seqlen_q",
        "max_seqlen_k": "max_seqlen_k",
        "cache_seqlens": "seqused_k",
        "cu_seqlens_q": "cu_seqlens_q",
        "causal": "causal",
    }
    for told, to in zip(schedules, attended[::2], strict=True):
        assert all(told[name] is to[other] for name, other in same.items())
        assert told["page_size"] == to["k"].shape[1]
        assert told["qkv_dtype"] == to["q"].dtype == to["k"].dtype
        assert told["batch_size"] == len(to["seqused_k"]) == 1
        assert (told["num_heads_q"], told["headdim"]) == to["q"].shape[1:]
        assert told["num_heads_kv"] == to["k"].shape[2]
        assert told["has_softcap"] == (to["softcap"] != 0)
    # the rows of decodes alone are dealt out
    assert [len(lengths) for lengths in dealt] == [2, 2]
    first, second = (layer.impl for layer in worker.layers)
    views = second.views.of(worker.layers[1].kv_cache)
    for launch in launches["decode"]:
        told = launch.arguments
        ((query, states, statistics, output, sinks, k_scale, v_scale),) = (
            launch.again_with
        )
        assert query.data_ptr() == told["query"].data_ptr()
        assert output.data_ptr() == told["output"].data_ptr()
        assert told["kv_cache"] is first.views.of(worker.layers[0].kv_cache).states
        assert states is views.states
        assert statistics is views.statistics
        assert sinks is second.sinks
        scaled = MODELS[name].is_fp8
        assert k_scale is (worker.layers[1]._k_scale if scaled else None)
        assert v_scale is (worker.layers[1]._v_scale if scaled else None)
    for launch in launches["measure"]:
        told = launch.arguments
        ((query, states, lse, statistics, k_scale),) = launch.again_with
        assert query.data_ptr() == told["query"].data_ptr()
        assert lse.shape == told["lse"].shape
        assert lse is not told["lse"]
        assert states is views.states
        assert statistics is views.statistics
        assert k_scale is (worker.layers[1]._k_scale if MODELS[name].is_fp8 else None)


def test_layers_of_another_kind_are_launched_anew(
    impl_on_cpu: None, compilations: list[ImaginedCompilation]
) -> None:
    worker = Worker(MODELS["plain"])
    worker.layers[1].impl._kind = (1, 2.0, 3.0)
    built = worker.built([(1, 70), (5, 3)])
    query = torch.zeros(6, 9, 64, dtype=torch.bfloat16)
    for layer in worker.layers:
        layer.impl.forward(
            layer, query, query, query, layer.kv_cache, built, torch.empty_like(query)
        )
    assert len(built.decodes.launches) == len(built.prefills.launches) == 2
    # FlashAttention's layout does not depend on the scale
    assert len(built.prefills.schedules) == 1
