# SPDX-License-Identifier: Apache-2.0
"""An fp8 KV cache in a whole engine, with scales far from 1.

The oracle rounds keys and values by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.engine.agreement import assert_agreement
from tests.engine.engines import Engine, running_engine
from tests.engine.final_pages import run_to_the_end
from tests.engine.kept_blocks import recorded_kept_blocks
from tests.engine.prefix_hits import JUNCTION, LAST, PROMPTS, assert_same
from tests.engine.steps import audited_manager, poisoned_free_blocks
from tests.engine.test_request_options import OWN, SERVER, generate, server_of
from tests.engine.tiny_models import SMALL_BUDGET, TINY_BUDGET, random_prompt
from tests.model_configs import save_config
from tests.oracle import Options
from tests.oracle import generate as generate_by_oracle
from tests.oracle.sequence import LiveSequence
from vllm_roco.scheduler import RocoAsyncScheduler

pytestmark = pytest.mark.engine

CROWD = [random_prompt(n, seed=n) for n in (20, 70, 96, 150, 210, 333)]
NUM_NEW = 150
SEEDS = {230: 230, 33: 33, 129: 1129, 80: 80}
"""Prompts that the oracle continues without a tie, by their lengths."""
POLICIES = {
    "contribution": replace(TINY_BUDGET, shield="contribution", shield_ratio=1),
    "peak": TINY_BUDGET,
    "recent": replace(TINY_BUDGET, policy="recent"),
}


def scales_of(layer: int, *, per_head: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales of a layer's keys and values; some numbers are too large."""
    own = torch.arange(2.0 if per_head else 1.0)
    return 0.02 * (layer + 1 + own), 0.005 / (layer + 1 + own)


@contextlib.contextmanager
def running_fp8(
    model: Path, options: Options, *, per_head: bool = False, **arguments: Any
) -> Iterator[Engine]:
    with running_engine(model, options, kv_cache_dtype="fp8", **arguments) as engine:
        for number, layer in enumerate(engine.layers.values()):
            layer._k_scale, layer._v_scale = scales_of(number, per_head=per_head)
        assert {cache.dtype for cache in engine.kv_caches} == {torch.uint8}
        yield engine
        assert engine.num_lost_blocks == 0


@contextlib.contextmanager
def oracle_in_fp8(*, per_head: bool) -> Iterator[None]:
    """Let the oracle keep what a byte can hold."""
    attend = LiveSequence.attend

    def rounded(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        by_head = scale[:, None, None]
        bounded = (states / by_head).clamp(-448, 448)
        return bounded.to(torch.float8_e4m3fn).float() * by_head

    def attend_rounded(
        sequence: LiveSequence,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *rest: Any,
    ) -> torch.Tensor:
        k_scale, v_scale = scales_of(layer, per_head=per_head)
        key, value = rounded(key, k_scale), rounded(value, v_scale)
        return attend(sequence, layer, query, key, value, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveSequence, "attend", attend_rounded)
        yield


@pytest.mark.parametrize("per_head", [False, True], ids=["tensor", "head"])
@pytest.mark.parametrize("name", POLICIES)
def test_tokens_and_kept_blocks_are_the_oracles(
    name: str,
    per_head: bool,
    tiny_llama: Path,
    tiny_llama_for_oracle: PreTrainedModel,
) -> None:
    options = POLICIES[name]
    prompts = [random_prompt(length, seed) for length, seed in SEEDS.items()]
    num_new = options.budget + 40
    with oracle_in_fp8(per_head=per_head):
        expected = [
            generate_by_oracle(tiny_llama_for_oracle, prompt, options, num_new)
            for prompt in prompts
        ]
    exact = generate_by_oracle(tiny_llama_for_oracle, prompts[0], options, num_new)
    assert expected[0].token_ids != exact.token_ids, "the rounding does not show"
    with (
        running_fp8(tiny_llama, options, per_head=per_head) as engine,
        recorded_kept_blocks(engine) as kept,
    ):
        together = engine.generate(prompts, num_new)
    assert_agreement(prompts, together, kept, expected)


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_a_checkpoint_turns_it_on_by_itself(strategy: str, tmp_path: Path) -> None:
    """It was refused, with the advice to leave an option out that nobody had given."""
    scheme = dict(
        num_bits=8, type="float", strategy=strategy, symmetric=True, dynamic=False
    )
    model = save_config(
        tmp_path,
        "llama",
        "LlamaForCausalLM",
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "ignore": [],
            "kv_cache_scheme": scheme,
        },
    )
    for dtype, held in (("auto", torch.uint8), ("bfloat16", torch.bfloat16)):
        with running_engine(
            model,
            TINY_BUDGET,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=256,
            kv_cache_dtype=dtype,
        ) as engine:
            assert {cache.dtype for cache in engine.kv_caches} == {held}
            heads = 2 if strategy == "attn_head" else 1
            for layer in engine.layers.values():
                assert layer._k_scale.numel() == heads
            engine.generate([random_prompt(150, seed=1)], 40)
            assert engine.manager.num_freed_blocks > 0


def test_freed_blocks_preemption_and_asynchronous_scheduling(
    tiny_llama: Path, asynchronous: None
) -> None:
    with running_fp8(tiny_llama, SMALL_BUDGET) as engine:
        expected = engine.generate_one_by_one(CROWD, NUM_NEW)
        assert engine.manager.num_freed_blocks > 0
    small: dict[str, Any] = dict(
        num_gpu_blocks_override=38, scheduler_reserve_full_isl=False
    )
    with (
        running_fp8(tiny_llama, SMALL_BUDGET, **small) as engine,
        audited_manager(engine) as steps,
        poisoned_free_blocks(engine),
    ):
        assert isinstance(engine.scheduler, RocoAsyncScheduler)
        assert engine.generate(CROWD, NUM_NEW) == expected
        assert steps.preemptions, "the pool has the wrong size"


def test_hits_of_snapshots_and_of_blocks(tiny_llama: Path) -> None:
    """Whole pages are copied, so that every byte is what it is without a hit."""
    names = ["donor", "same", "sibling", "second sibling", "next turn"]
    prompts = [PROMPTS[name] for name in names]
    short = random_prompt(90, seed=9)
    with running_fp8(tiny_llama, SMALL_BUDGET) as engine:
        expected = [run_to_the_end(engine, [prompt], 100)[0] for prompt in prompts]
        expected_short = engine.generate([short], 30)
    with (
        running_fp8(tiny_llama, SMALL_BUDGET, enable_prefix_caching=True) as engine,
        audited_manager(engine),
        poisoned_free_blocks(engine),
    ):
        found = [run_to_the_end(engine, [prompt], 100)[0] for prompt in prompts]
        for ending, other in zip(found, expected, strict=True):
            assert_same(ending, other)
        begun = [ending.num_cached_tokens for ending in found]
        assert begun == [0, LAST, 0, JUNCTION, LAST]
        for cached in (0, 80):
            (output,) = engine.run([short], 30)
            assert output.num_cached_tokens == cached
            assert [tuple(output.outputs[0].token_ids)] == expected_short


def test_options_of_requests(tiny_llama: Path) -> None:
    prompt = random_prompt(200, seed=200)
    names = ["64", "256", "prompt", "h2o"]
    with running_fp8(
        tiny_llama, SMALL_BUDGET, additional_config={"roco": SERVER}
    ) as engine:
        together = generate(engine, [(name, prompt) for name in names])
    assert len(set(together)) == len(names)
    for name, tokens in zip(names, together, strict=True):
        with running_fp8(tiny_llama, SMALL_BUDGET, **server_of(name)) as engine:
            assert engine.generate([prompt], NUM_NEW) == [tokens], OWN[name]
