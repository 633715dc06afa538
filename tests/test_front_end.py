# SPDX-License-Identifier: Apache-2.0
"""A request that cannot be served ends where it arrives, with vLLM's own error."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

import vllm_roco
from tests.model_configs import save_config
from vllm_roco import front_end

OPTIONS = {"budget": 128, "stride": 32, "chunk": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("llama"), "llama", "LlamaForCausalLM")


def processor(folder: Path, backend: str | None = "roco", **roco: Any) -> Any:
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_seqs=4,
        max_num_batched_tokens=512,
        attention_backend=backend,
        additional_config={"roco": OPTIONS | roco},
        enable_prompt_embeds=True,
    ).create_engine_config()
    return InputProcessor(config)


def process(
    processor: InputProcessor, prompt: Any = 10, **params: Any
) -> EngineCoreRequest:
    if isinstance(prompt, int):
        prompt = {"type": "token", "prompt_token_ids": [1] * prompt}
    return processor.process_inputs(
        "id", prompt, SamplingParams(**params), supported_tasks=("generate",)
    )


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("LlamaForCausalLM", None),
        ("MiMoV2ForCausalLM", "bring an attention backend of their own"),
    ],
)
def test_an_engine_that_cannot_be_served_ends_where_it_begins(
    folder: Path, architecture: str, told: str | None
) -> None:
    """Also on platforms that see no settings before a layer asks for RoCo."""
    config = processor(folder, backend=None).vllm_config
    config.attention_config.backend = AttentionBackendEnum["ROCO"]
    config.model_config.model_arch_config.architectures = [architecture]
    if told is None:
        InputProcessor(config)
    else:
        with pytest.raises(NotImplementedError, match=told):
            InputProcessor(config)


def test_a_bad_option_is_vllms_error_with_key_and_value(folder: Path) -> None:
    with pytest.raises(VLLMValidationError, match="Use at most 128, or ask") as error:
        process(processor(folder), extra_args={"roco_budget": 256})
    assert (error.value.parameter, error.value.value) == ("roco_budget", 256)


def test_good_options_pass_unchanged(folder: Path) -> None:
    options = {"roco_budget": 64, "other": [1]}
    request = process(processor(folder), extra_args=options)
    assert request.sampling_params is not None
    assert request.sampling_params.extra_args == options
    assert process(processor(folder), max_tokens=3).sampling_params is not None


def test_other_engines_of_the_process_take_every_request(folder: Path) -> None:
    """Whichever engine was configured last decided for every engine of a process."""
    ours = processor(folder)
    other = processor(folder, backend=None)
    process(other, seed=7, temperature=1, extra_args={"roco_budget": "many"})
    with pytest.raises(VLLMValidationError, match="roco: seed = 7 .* Leave seed out"):
        process(ours, seed=7, temperature=1)
    process(ours, seed=7, temperature=0)


@pytest.mark.parametrize(
    "prompt",
    [
        {"type": "token", "prompt_token_ids": [1] * 40},
        {"type": "embeds", "prompt_embeds": torch.zeros(40, 64)},
        # vLLM still takes what it has not rendered
        {"prompt_token_ids": [1] * 40},
    ],
    ids=["tokens", "embeddings", "raw"],
)
def test_the_prompts_length_counts(folder: Path, prompt: Any) -> None:
    options = {"roco_mode": "generation", "roco_budget": 80}
    ours = processor(folder, max_budget=144)
    process(ours, 64, extra_args=options)
    process(ours, prompt, extra_args=options)
    with pytest.raises(VLLMValidationError, match=r"keeps the prompt \(40 tokens\)"):
        process(ours, prompt, extra_args=options | {"roco_budget": 112})


def test_blocks_that_the_engine_has_made_larger_count(folder: Path) -> None:
    ours = processor(folder)
    process(ours, extra_args={"roco_budget": 48, "roco_stride": 16, "roco_sink": 0})
    ours.vllm_config.cache_config.block_size = 32
    with pytest.raises(VLLMValidationError, match=r"block size \(32 tokens\)"):
        process(ours, extra_args={"roco_budget": 48})


def test_every_setting_that_bounds_a_chunk_is_named(folder: Path) -> None:
    """One of them was, whichever it was that bounded."""
    ours = processor(folder)
    scheduler = ours.vllm_config.scheduler_config
    scheduler.long_prefill_token_threshold = 320
    scheduler.max_num_scheduled_tokens = 416
    batch = "--max-num-batched-tokens less --max-num-seqs (508)"
    step = "--max-num-scheduled-tokens less --max-num-seqs (412)"
    for chunk, says in [
        (336, "more than --long-prefill-token-threshold (320). Use at most 320, or"),
        (416, f"more than {step} and --long-prefill-token-threshold (320). Use at"),
        (512, f"more than {batch}, {step} and --long-prefill-token-threshold (320)."),
    ]:
        with pytest.raises(VLLMValidationError) as error:
            process(ours, extra_args={"roco_chunk": chunk})
        assert says in str(error.value)


def test_what_could_never_fit_is_refused(folder: Path) -> None:
    """The scheduler alone refused it, with an HTTP 500."""
    ours = processor(folder, allow_full=True)
    config = ours.vllm_config
    full = {"max_tokens": 150, "extra_args": {"roco_mode": "full"}}
    # no engine has told yet what it has
    process(ours, 20, **full)
    # one block is vLLM's null block
    config.cache_config.num_gpu_blocks = 1 + 10
    process(ours, 10, **full)
    process(ours, 40, max_tokens=4000, extra_args={"roco_budget": 64, "roco_chunk": 16})
    with pytest.raises(VLLMValidationError) as error:
        process(ours, 11, **full)
    assert str(error.value).startswith(
        "roco: max_tokens = 150 after a prompt of 11 tokens may hold 11 blocks of 16 "
        "tokens, but the KV cache has 10, so the request could never be served to its "
        'end. Use a max_tokens of at most 149, or mode "both" with a smaller budget, '
        "stride or chunk."
    )
    assert (error.value.parameter, error.value.value) == ("max_tokens", 150)
    # without options as well
    with pytest.raises(VLLMValidationError, match="or a smaller budget, stride or"):
        process(ours, 40, max_tokens=4000)


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 21),
        ({"data_parallel_size": 2, "data_parallel_rank_local": None}, 2 * 21 + 1),
        ({"data_parallel_size": 2, "data_parallel_rank_local": 0}, 21),
        (
            {
                **{"data_parallel_size": 3, "data_parallel_rank_local": None},
                "data_parallel_external_lb": True,
            },
            21,
        ),
    ],
    ids=["one", "internal", "offline", "external"],
)
def test_each_engine_has_blocks_of_its_own(
    folder: Path, changes: dict[str, Any], blocks: int
) -> None:
    """vLLM tells a front end the sum over the engines that it talks to."""
    ours = processor(folder, allow_full=True)
    for name, value in changes.items():
        setattr(ours.vllm_config.parallel_config, name, value)
    ours.vllm_config.cache_config.num_gpu_blocks = blocks
    full = {"extra_args": {"roco_mode": "full"}}
    process(ours, 300, max_tokens=20, **full)
    with pytest.raises(VLLMValidationError, match="max_tokens of at most 20, or"):
        process(ours, 300, max_tokens=21, **full)


def test_requests_are_checked_once_however_often_plugins_load(folder: Path) -> None:
    before = InputProcessor.process_inputs
    vllm_roco.register()
    assert InputProcessor.process_inputs is before
    assert before.__name__ == "process_inputs"


def test_a_later_wrapper_of_others_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs() -> None:
        pass

    monkeypatch.setattr(InputProcessor, "process_inputs", theirs)
    front_end.check_requests()
    assert InputProcessor.process_inputs is theirs


def test_threads_may_check_at_once(folder: Path) -> None:
    ours = processor(folder)

    def refused(number: int) -> bool:
        budget = 64 if number % 2 else 65
        try:
            process(ours, extra_args={"roco_budget": budget})
        except VLLMValidationError:
            return True
        return False

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(refused, range(64)))
    assert answers == [True, False] * 32
