# SPDX-License-Identifier: Apache-2.0
"""An fp8 KV cache on a GPU: beside stock vLLM's, the oracle's, and under graphs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.engines import Engine
from tests.engine.mixed_models import save_mixed
from tests.engine.passkeys import ARGUMENTS, DEFAULT, keys_found, passkeys
from tests.engine.steps import poisoned_free_blocks, recorded_steps
from tests.engine.test_fp8 import SEEDS, oracle_in_fp8, scales_of
from tests.engine.tiny_models import (
    SMALL_BUDGET,
    TINY_BUDGET,
    load_for_oracle,
    random_prompt,
    save_tiny_model,
)
from tests.gpu.engines import EAGER, RUNS, gpu_engine
from tests.gpu.test_equals_stock import (
    NEVER,
    Answer,
    Disagreement,
    answers,
    answers_of,
)
from tests.oracle import generate
from vllm_roco.kv_cache.integrity import check_integrity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.usefixtures("engine_lock"),
]

PROMPTS = [random_prompt(length, seed) for length, seed in SEEDS.items()]
NUM_NEW = 104
CROWD = [random_prompt(length, seed=length) for length in range(20, 500, 40)]
STOCK: dict[str, Any] = dict(dtype="bfloat16", attention_backend="FLASH_ATTN")


def set_scales(engine: Engine, *, per_head: bool) -> None:
    """Give every layer scales of its own, in the memory that graphs read."""
    for number, layer in enumerate(engine.layers.values()):
        scales = scales_of(number, per_head=per_head)
        for name, scale in zip(("_k_scale", "_v_scale"), scales, strict=True):
            if per_head:
                setattr(layer, name, scale.to(layer._k_scale.device))
            else:
                getattr(layer, name).copy_(scale[0])


def test_bfloat16_differs_from_stock_fp8_as_stock_backends_do(model: Path) -> None:
    """Stock fp8 quantises the queries of decodes too, which is no small difference."""
    assert_differs_no_more_than_rounding(
        plain=answers(model, None, **STOCK),
        flash=answers(model, None, kv_cache_dtype="fp8", **STOCK),
        ours=answers(model, NEVER, dtype="bfloat16", kv_cache_dtype="fp8"),
    )


def assert_differs_no_more_than_rounding(
    *, plain: list[Answer], flash: list[Answer], ours: list[Answer]
) -> None:
    """Judge by how much fp8 changes stock vLLM's answers."""
    by_rounding = Disagreement.between(flash, plain)
    for other in (flash, plain):
        found = Disagreement.between(ours, other)
        assert found.parted <= 2 * by_rounding.parted + 1
        assert found.widest_gap <= 2 * by_rounding.widest_gap + 0.05


@pytest.mark.parametrize("name", ["exaone4", "gemma3"])
def test_beside_windows_it_differs_as_stock_backends_do(
    name: str, tmp_path: Path
) -> None:
    """All layers have an fp8 cache, and scales of their own.

    The tokens of prompts have the same probabilities as in stock vLLM but for what fp8
    changes: there both multiply fp8 queries.
    """
    folder = save_mixed(name, tmp_path)
    fp8: dict[str, Any] = dict(kv_cache_dtype="fp8")
    steps: dict[str, Any] = dict(max_num_seqs=16, max_num_batched_tokens=2048)
    found = {}
    for run, options, arguments in (
        ("plain", None, STOCK),
        ("flash", None, STOCK | fp8),
        ("ours", NEVER, fp8 | {"dtype": "bfloat16"}),
    ):
        with gpu_engine(folder, options, **steps, **arguments) as engine:
            backends = {x.attn_backend.get_name() for x in engine.layers.values()}
            caches = {x.kv_cache.dtype for x in engine.layers.values()}
            if run == "ours":
                assert backends == {"ROCO", "FLASH_ATTN"}
            if run != "plain":
                assert caches == {torch.uint8}
                for number, layer in enumerate(engine.layers.values()):
                    layer._k_scale.fill_(0.011 * (number + 1))
                    layer._v_scale.fill_(0.007 * (number + 1))
            found[run] = (
                answers_of(engine, CROWD, NUM_NEW),
                engine.log_probabilities(CROWD),
            )
    assert_differs_no_more_than_rounding(**{run: x for run, (x, _) in found.items()})
    plain, flash, ours = (x for _, x in found.values())
    by_rounding, by_roco = ((x - flash).abs().mean() for x in (plain, ours))
    print(f"{name}: fp8 {by_rounding:.1e}, RoCo {by_roco:.1e}")
    assert by_roco < by_rounding / 2


@pytest.mark.parametrize("per_head", [False, True], ids=["tensor", "head"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["llama", "granite-swa"])
def test_tokens_are_the_oracles(
    name: str, run: str, per_head: bool, tmp_path: Path
) -> None:
    """Graphs, too, read the scales that are set after they were captured.

    The second model has attention sinks.

    A float32 key that is rounded the other way on a GPU is another byte, which may
    decide between tokens that are nearly as likely.
    """
    if per_head and run != "eager":
        pytest.skip("a vector takes the place of the number that graphs read")
    folder = save_tiny_model(name, tmp_path)
    model = load_for_oracle(folder)
    with oracle_in_fp8(per_head=per_head):
        expected = [generate(model, prompt, TINY_BUDGET, NUM_NEW) for prompt in PROMPTS]
    with gpu_engine(folder, TINY_BUDGET, kv_cache_dtype="fp8", **RUNS[run]) as engine:
        assert {cache.dtype for cache in engine.kv_caches} == {torch.uint8}
        unscaled = engine.generate(PROMPTS, NUM_NEW)
        set_scales(engine, per_head=per_head)
        tokens = engine.generate(PROMPTS, NUM_NEW)
        with poisoned_free_blocks(engine):
            assert engine.generate(PROMPTS, NUM_NEW) == tokens
        assert engine.num_lost_blocks == 0
    assert unscaled != tokens
    for found, oracle in zip(tokens, expected, strict=True):
        pairs = zip(found, oracle.token_ids, oracle.token_margins, strict=True)
        closed = next((margin for ours, its, margin in pairs if ours != its), 0.0)
        assert closed < 0.1


def test_a_vector_of_equal_scales_is_a_scale(smollm2: Path) -> None:
    """FlashAttention's queries, our kernels and the writing of pages, in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [key.token_ids for key in passkeys(tokenizer)]
    settings = {**ARGUMENTS, **EAGER, "dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    with gpu_engine(
        smollm2, DEFAULT, **settings, num_gpu_blocks_override=4096
    ) as engine:
        for layer in engine.layers.values():
            for name in ("_q_scale", "_k_scale", "_v_scale"):
                getattr(layer, name).fill_(0.25)
        expected = engine.generate_one_by_one(prompts[:4], 16)
        for layer in engine.layers.values():
            for name in ("_q_scale", "_k_scale", "_v_scale"):
                setattr(layer, name, getattr(layer, name).repeat(layer.num_kv_heads))
        assert engine.generate_one_by_one(prompts[:4], 16) == expected


def test_passkeys_are_found(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    settings: dict[str, Any] = {**ARGUMENTS, "kv_cache_dtype": "fp8"}
    with gpu_engine(
        smollm2, DEFAULT, **settings, num_gpu_blocks_override=2048
    ) as engine:
        assert keys_found(engine, tokenizer, passkeys(tokenizer)) >= 14


@pytest.mark.parametrize("name", ["llama", "exaone4"])
def test_a_crowd_with_graphs_and_preemption(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Also beside layers with a window, whose pages are bytes as well."""
    model = tiny_llama if name == "llama" else save_mixed(name, tmp_path)
    prompts = [random_prompt(1 + 7 * seed % 500, seed) for seed in range(200)]
    with (
        gpu_engine(
            model,
            SMALL_BUDGET,
            dtype="bfloat16",
            kv_cache_dtype="fp8",
            async_scheduling=True,
            max_num_seqs=64,
            max_num_batched_tokens=1024,
            num_gpu_blocks_override=300,
            scheduler_reserve_full_isl=False,
        ) as engine,
        recorded_steps(engine) as steps,
        poisoned_free_blocks(engine),
    ):
        completions = engine.complete(prompts, 100, logprobs=1)
        assert engine.num_lost_blocks == 0
        check_integrity(engine.manager)
        assert engine.manager.num_freed_blocks > len(prompts)
    assert steps.preemptions
    for completion in completions:
        assert len(completion.token_ids) == 100
        assert math.isfinite(completion.cumulative_logprob)
