# SPDX-License-Identifier: Apache-2.0
"""What RoCo refuses at start-up, by the message that a user of vLLM gets to see.

Each message says what is wrong, which value, what is allowed and what to do.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm import LLM
from vllm.platforms.interface import Platform, PlatformEnum
from vllm.v1.core.sched.scheduler import Scheduler

from tests.refusals.cases import Case, arguments_of, engine_config, refused
from vllm_roco.attention import backend
from vllm_roco.scheduler import RocoSchedulerMixin


class ForeignScheduler(Scheduler):
    """A scheduler of the user's own that knows nothing of RoCo."""


BAD_OPTIONS = {
    "unknown-key": Case(
        ("'budgets' = 64", "Allowed keys are policy, ", "Correct or remove"),
        {"budgets": 64},
    ),
    "policy": Case(("policy = 'tova'", '"roco" or "h2o" or '), {"policy": "tova"}),
    "shield": Case(
        ("shield = 'mean'", '"contribution" or "peak" or "deviation"'),
        {"shield": "mean"},
    ),
    "shield-ratio": Case(
        ("shield_ratio = 1.5", "a number from 0 to 1"), {"shield_ratio": 1.5}
    ),
    "budget-text": Case(("budget = '128'", "a whole number"), {"budget": "128"}),
    "budget-zero": Case(("budget = 0", "at least 1"), {"budget": 0}),
    "stride-fraction": Case(("stride = 32.0", "a whole number"), {"stride": 32.0}),
    "chunk-negative": Case(("chunk = -64", "at least 1"), {"chunk": -64}),
    "sink-negative": Case(("sink = -1", "at least 0"), {"sink": -1}),
    "recent-bool": Case(("recent = True", "a whole number"), {"recent": True}),
    "trace-empty": Case(("trace = ''", "a file path"), {"trace": ""}),
    "trace-in-no-directory": Case(
        ("trace = '/no/t.jsonl'", "No such file or directory", "an existing directory"),
        {"trace": "/no/t.jsonl"},
    ),
    "trace-is-a-directory": Case(
        ("trace = '/'", "Is a directory", "or leave trace out"), {"trace": "/"}
    ),
    "protected": Case(
        ("sink + recent is 100 + 100 = 200", "budget = 128", "Lower sink or recent"),
        {"sink": 100, "recent": 100},
    ),
    "protected-blocks": Case(
        ("sink = 57 and recent = 65", "144 tokens", "budget = 128", "Lower them"),
        {"sink": 57, "recent": 65},
    ),
    "budget-blocks": Case(
        ("budget = 100", "block size (16", "96 or 112"), {"budget": 100}
    ),
    "stride-blocks": Case(("stride = 8", "block size (16", "Use 16"), {"stride": 8}),
    "chunk-blocks": Case(("chunk = 72", "block size (16", "64 or 80"), {"chunk": 72}),
    "larger-blocks": Case(
        ("stride = 32", "block size (64", "Use 64"), arguments={"block_size": 64}
    ),
    "not-a-dictionary": Case(
        ("additional_config['roco'] is 512", "must be a dictionary"),
        arguments={"additional_config": {"roco": 512}},
    ),
}

BAD_SETTINGS = {
    "block-size-8": Case(
        ("block_size = 8", "multiple of 16", "Leave --block-size out"),
        arguments={"block_size": 8},
    ),
    "block-size-24": Case(
        ("block_size = 24", "multiple of 16", "16, 32, 64 or 128"),
        arguments={"block_size": 24},
    ),
    "batched-tokens": Case(
        ("max_num_batched_tokens = 67", "4 + 64 = 68", "--max-num-batched-tokens 68"),
        arguments={"max_num_batched_tokens": 67, "max_model_len": 65},
    ),
    "batched-tokens-of-short-sequences": Case(
        ("max_num_batched_tokens = 66", "4 + 63 = 67", "--max-num-batched-tokens 67"),
        arguments={"max_num_batched_tokens": 66, "max_model_len": 64},
    ),
    "scheduled-tokens": Case(
        ("max_num_scheduled_tokens = 67", "= 68", "--max-num-scheduled-tokens 68"),
        arguments={"max_num_scheduled_tokens": 67},
    ),
    "chunked-prefill": Case(
        ("enable_chunked_prefill = False", "chunks of 64", "Leave"),
        arguments={"enable_chunked_prefill": False},
    ),
    "long-prefill": Case(
        ("long_prefill_token_threshold = 32", "at least 64", "at most 32"),
        arguments={"long_prefill_token_threshold": 32},
    ),
    "long-prefill-adaptive": Case(
        ("long_prefill_token_threshold = 48", "at least 64", "at most 48"),
        arguments={
            "long_prefill_token_threshold": 48,
            "long_prefill_token_threshold_adaptive": True,
        },
    ),
    "scheduler": Case(
        ("ForeignScheduler", "Leave --scheduler-cls out", "RocoSchedulerMixin"),
        arguments={"scheduler_cls": ForeignScheduler},
    ),
    "speculation": Case(
        ("speculative_config = 'ngram'", "Leave --speculative-config out"),
        arguments={
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 2,
                "prompt_lookup_max": 2,
            }
        },
    ),
    "kv-connector": Case(
        ("kv_transfer_config = 'ExampleConnector'", "Leave --kv-transfer-config"),
        arguments={
            "kv_transfer_config": {
                "kv_connector": "ExampleConnector",
                "kv_role": "kv_both",
            }
        },
    ),
    "kv-offloading": Case(
        ("kv_offloading_size = 1", "Leave --kv-offloading-size out"),
        arguments={"kv_offloading_size": 1},
    ),
    # with vLLM 0.32 a sequence longer than the KV cache stopped the engine
    "routed-experts": Case(
        (
            "enable_return_routed_experts = True",
            "Leave --enable-return-routed-experts out",
        ),
        arguments={"enable_return_routed_experts": True},
    ),
    "dcp": Case(
        ("decode_context_parallel_size = 2", "Use 1"),
        arguments={"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
    ),
    "pcp": Case(
        ("prefill_context_parallel_size = 2", "Use 1"),
        arguments={"prefill_context_parallel_size": 2},
    ),
    "dbo": Case(
        ("enable_dbo = True", "Leave --enable-dbo out"),
        arguments={"enable_dbo": True},
    ),
    "ubatch": Case(("ubatch_size = 2", "Use 0"), arguments={"ubatch_size": 2}),
    **{
        name: Case(
            (f"kv_cache_dtype = '{name}'", "Use --kv-cache-dtype bfloat16, or fp8"),
            arguments={"kv_cache_dtype": name},
        )
        for name in (
            *("fp8_e5m2", "fp8_inc", "fp8_per_token_head", "int8_per_token_head"),
            *("nvfp4", "turboquant_4bit_nc", "ultraquant_4bit"),
        )
    },
    "fp8-of-some-layers": Case(
        (
            "kv_cache_dtype_skip_layers = ['1']",
            "Leave --kv-cache-dtype-skip-layers out",
        ),
        arguments={"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["1"]},
    ),
    "diffusion": Case(
        ("is a diffusion model", "Serve a model with layers of full attention"),
        arguments={"diffusion_config": {"canvas_length": 32}},
    ),
    "fast-prefill": Case(
        ("kv_sharing_fast_prefill = True", "Leave --kv-sharing-fast-prefill out"),
        arguments={"kv_sharing_fast_prefill": True},
    ),
}


def test_what_the_cases_change_is_accepted_without_the_change(llama: Path) -> None:
    """Or every case below could be refused for a reason of its own."""
    config = engine_config(llama, Case(()))
    assert config.attention_config.backend.name == "ROCO"


@pytest.mark.parametrize("name", BAD_OPTIONS | BAD_SETTINGS)
def test_start_is_refused(llama: Path, name: str) -> None:
    case = (BAD_OPTIONS | BAD_SETTINGS)[name]
    with pytest.raises((ValueError, NotImplementedError)) as error:
        engine_config(llama, case)
    refused(str(error.value), case)


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_sequences_shorter_than_a_chunk_need_no_room_for_one(
    llama: Path, max_num_seqs: int
) -> None:
    """A server of one short sequence was asked for room that no prompt can fill."""
    tokens = max_num_seqs + 255
    case = Case(
        (),
        {"chunk": 512},
        {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": tokens},
    )
    assert engine_config(llama, case).scheduler_config.max_num_batched_tokens == tokens


@pytest.mark.parametrize("name", ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"])
def test_other_kv_cache_dtypes_are_accepted(llama: Path, name: str) -> None:
    case = Case((), arguments={"kv_cache_dtype": name})
    assert engine_config(llama, case).cache_config.cache_dtype == name


def test_a_scheduler_with_the_mixin_is_accepted(llama: Path) -> None:
    class Derived(RocoSchedulerMixin, ForeignScheduler):
        """The user's scheduler, with RoCo's chunks."""

    config = engine_config(llama, Case((), arguments={"scheduler_cls": Derived}))
    assert config.scheduler_config.scheduler_cls is Derived


@pytest.mark.engine
def test_scheduler_without_layers_is_refused(in_process: None, llama: Path) -> None:
    case = Case(
        ("RocoScheduler serves layers", "no layer uses it", "Add --attention-backend"),
        arguments={
            "attention_backend": None,
            "scheduler_cls": "vllm_roco.scheduler.RocoScheduler",
        },
    )
    with pytest.raises(ValueError) as error:
        LLM(**arguments_of(llama, case))
    refused(str(error.value), case)


def test_a_trace_is_checked_and_left_alone(llama: Path, tmp_path: Path) -> None:
    new, old = tmp_path / "new.jsonl", tmp_path / "old.jsonl"
    old.write_text("{}\n")
    for path in (new, old):
        engine_config(llama, Case((), {"trace": str(path)}))
    assert not new.exists()
    assert old.read_text() == "{}\n"


@pytest.mark.parametrize("kind", [PlatformEnum.ROCM, PlatformEnum.XPU])
def test_platform_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: PlatformEnum
) -> None:
    class OtherPlatform(Platform):
        _enum = kind
        device_name = kind.name.lower()

    monkeypatch.setattr(backend, "current_platform", OtherPlatform())
    for ask in (backend.RocoBackend.get_impl_cls, backend.RocoBackend.get_builder_cls):
        with pytest.raises(NotImplementedError) as error:
            ask()
        says = (f"platform '{kind.name.lower()}'", "another --attention-backend")
        refused(str(error.value), Case(says))
