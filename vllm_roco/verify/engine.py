# SPDX-License-Identifier: Apache-2.0
"""What a real engine does on this machine, with a tiny random model."""

from __future__ import annotations

import json
import operator
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_roco.backend_name import BACKEND_NAME
from vllm_roco.chunking import ChunkEnds, next_step_ends
from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.verify.findings import Failed, Skipped
from vllm_roco.verify.worker import EXTENSION

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import RequestOutput

BUDGET, STRIDE, CHUNK = 64, 32, 64
BLOCK_SIZE = 16
NUM_NEW = 100
PROMPTS = (158, 157, 90, 40)
"""Prompt lengths of the engine check, in tokens; the first two end at an eviction."""
NUM_SHARED = 3 * CHUNK
"""Tokens that the prompts of the prefix check share, past their first eviction."""

_SCHEDULE = EvictionSchedule(block_size=BLOCK_SIZE, budget=BUDGET, stride=STRIDE)

_HIDDEN, _VOCABULARY, _NUM_LAYERS = 128, 256, 2
_MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": _VOCABULARY,
    "hidden_size": _HIDDEN,
    "intermediate_size": _HIDDEN,
    "num_hidden_layers": _NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


class EngineChecks:
    """Checks that share an engine, which starts when the first of them needs it."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._llm: LLM | None = None

    def check_steps(self) -> str:
        """Generate with a tiny random model beyond its budget, with graphs on a GPU."""
        from vllm_roco.metrics import get_metrics

        llm = self._engine()
        layers = _check_layers(llm)
        compiled_before = _compiled_kernels(llm)
        freed_before = get_metrics(llm).freed_blocks
        num_traced = len(self._trace())
        outputs = _generate(
            llm,
            # no prefix in common, so that each is read from its first token on
            [
                [(i + n) % 256 for n in range(length)]
                for i, length in enumerate(PROMPTS)
            ],
            NUM_NEW,
        )
        metrics = get_metrics(llm)
        vllm_config = llm.llm_engine.vllm_config
        _check_step_ends(self._trace()[num_traced:])
        bound = _SCHEDULE.max_blocks(vllm_config.max_concurrent_batches * CHUNK)
        if metrics.peak_sequence_kv_tokens > bound * BLOCK_SIZE:
            raise Failed(
                f"a sequence held {metrics.peak_sequence_kv_tokens} tokens of KV "
                f"cache, more than the bound of {bound * BLOCK_SIZE} that vLLM plans "
                "with"
            )
        mode = vllm_config.compilation_config.cudagraph_mode
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        if counts != [NUM_NEW] * len(PROMPTS):
            raise Failed(f"{NUM_NEW} tokens were asked of each prompt; {counts} came")
        freed = metrics.freed_blocks - freed_before
        expected = _expected_freed_blocks(vllm_config.max_concurrent_batches)
        if freed not in expected:
            raise Failed(
                f"{expected[0]} to {expected[-1]} blocks had to be freed, {freed} were"
            )
        longest = max(PROMPTS) + NUM_NEW
        compiled = _compiled_kernels(llm) - compiled_before
        return (
            f"{sum(counts)} tokens; {freed} blocks freed, at most "
            f"{metrics.peak_sequence_kv_tokens} of {longest} tokens held by a sequence "
            f"(bound {bound * BLOCK_SIZE}); prompt steps end where they must; "
            f"CUDA graphs {getattr(mode, 'name', mode)}\n"
            f"layers by backend: {layers}; kernels compiled: {compiled_before} before "
            f"the first request, {compiled} while serving"
        )

    def check_prefixes(self) -> str:
        """Begin behind a prefix that another prompt has read, past an eviction."""
        from vllm_roco.metrics import PrefixCounts, get_metrics

        llm = self._engine()
        before = get_metrics(llm).prefix_cache
        shared = [5 * n % 256 for n in range(NUM_SHARED)]
        first, second = ([*shared, *[mark] * 10] for mark in (1, 2))
        # the second waits for the first, if it comes before that one has read enough
        together = _generate(llm, [first, second], 1)
        (hit,) = _generate(llm, [second], NUM_NEW)
        (read,) = _generate(llm, [second], NUM_NEW, skip_reading_prefix_cache=True)
        begun = [output.num_cached_tokens for output in (*together, hit, read)]
        expected = [0, NUM_SHARED, NUM_SHARED, 0]
        if begun != expected:
            raise Failed(
                f"of two prompts with {NUM_SHARED} tokens in common, the second one "
                "once more, and that without a look at the prefix cache, "
                f"{expected} tokens had to be there already; {begun} were"
            )
        after = get_metrics(llm).prefix_cache
        counts = PrefixCounts(*map(operator.sub, after, before))
        shown = ", ".join(
            f"{name.replace('_', ' ')} {number}"
            for name, number in counts._asdict().items()
        )
        if (counts.snapshot_hits, counts.saved_tokens) != (2, 2 * NUM_SHARED):
            raise Failed(
                f"2 hits saved {2 * NUM_SHARED} tokens, but the metrics tell: {shown}"
            )
        differs = [
            place
            for place, tokens in enumerate(
                zip(hit.outputs[0].token_ids, read.outputs[0].token_ids, strict=True)
            )
            if len({*tokens}) > 1
        ]
        if differs:
            raise Failed(
                f"behind a hit of {NUM_SHARED} tokens a prompt goes on with other "
                f"tokens than when it is read: first at token {differs[0]} of {NUM_NEW}"
            )
        return (
            f"behind {NUM_SHARED} of {len(second)} tokens that another prompt has "
            f"read, the same {NUM_NEW} tokens follow\n{shown}"
        )

    def close(self) -> None:
        """Stop the engine; what is checked next starts another one."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _engine(self) -> LLM:
        if self._llm is None:
            if self._folder is not None:
                raise Skipped("needs the engine, which has not started")
            self._folder = tempfile.TemporaryDirectory()
            self._llm = _start(Path(self._folder.name))
        return self._llm

    def _trace(self) -> list[dict[str, Any]]:
        assert self._folder is not None
        trace = _trace_in(Path(self._folder.name))
        return [json.loads(line) for line in trace.read_text().splitlines()]


def _start(folder: Path) -> LLM:
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        execution: dict[str, Any] = {
            # without torch.compile, which takes longer than everything else here
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            "kv_cache_memory_bytes": 2**28,
            "gpu_memory_utilization": 0.1,
        }
    else:
        execution = {"enforce_eager": True}
    _write_model(folder)
    return LLM(
        str(folder),
        attention_backend="ROCO",
        additional_config={
            "roco": {
                "budget": BUDGET,
                "stride": STRIDE,
                "chunk": CHUNK,
                "turn_end_token_ids": [],
                "sink": 16,
                "recent": 16,
                "trace": str(_trace_in(folder)),
            }
        },
        worker_extension_cls=EXTENSION,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        block_size=BLOCK_SIZE,
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=256,
        **execution,
    )


def _trace_in(folder: Path) -> Path:
    return folder / "trace.jsonl"


def _write_model(folder: Path) -> None:
    """Write a model whose next token depends on all that it attends to.

    vLLM's own dummy weights are so small that it depends on the last token alone.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int = _HIDDEN) -> torch.Tensor:
        weights = torch.randn(rows, columns, generator=generator)
        return (0.2 * weights).to(torch.bfloat16)

    ones = torch.ones(_HIDDEN, dtype=torch.bfloat16)
    num_kv = _MODEL["num_key_value_heads"] * _MODEL["head_dim"]
    weights = {
        "model.embed_tokens.weight": matrix(_VOCABULARY),
        "model.norm.weight": ones.clone(),
        "lm_head.weight": matrix(_VOCABULARY),
    }
    for number in range(_NUM_LAYERS):
        layer = f"model.layers.{number}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = ones.clone()
        for name, rows in {
            "self_attn.q_proj": _HIDDEN,
            "self_attn.k_proj": num_kv,
            "self_attn.v_proj": num_kv,
            "self_attn.o_proj": _HIDDEN,
            "mlp.gate_proj": _HIDDEN,
            "mlp.up_proj": _HIDDEN,
            "mlp.down_proj": _HIDDEN,
        }.items():
            weights[f"{layer}.{name}.weight"] = matrix(rows)
    (folder / "config.json").write_text(json.dumps(_MODEL))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _generate(
    llm: LLM, prompts: Sequence[list[int]], max_tokens: int, **sampling: Any
) -> list[RequestOutput]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    return llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            **sampling,
        ),
        use_tqdm=False,
    )


def _check_layers(llm: LLM) -> str:
    """Return how many layers each backend has; raise unless all of them are ours."""
    (layers,) = llm.collective_rpc("roco_layers")
    shown = ", ".join(f"{name} {number}" for name, number in sorted(layers.items()))
    if layers != {BACKEND_NAME: _NUM_LAYERS}:
        raise Failed(
            f"{_NUM_LAYERS} layers of full attention had to be of {BACKEND_NAME}, but "
            f"layers by backend are: {shown or 'none'}"
        )
    return shown


def _compiled_kernels(llm: LLM) -> int:
    (number,) = llm.collective_rpc("roco_compiled_kernels")
    assert isinstance(number, int)
    return number


def _check_step_ends(steps: Sequence[dict[str, Any]]) -> None:
    """Raise unless every step of a prompt ended where RoCo asks vLLM to end it.

    Args:
        steps: Lines of the trace.
    """
    reached: dict[str, int] = {}
    for step in steps:
        request, end = step["request"], step["computed_tokens"]
        reached.setdefault(request, 0)
        # vLLM names requests in the order of their prompts
        num_prompt = PROMPTS[[*reached].index(request)]
        begin, reached[request] = reached[request], end
        if begin < num_prompt:
            least, most = next_step_ends(
                begin, num_prompt, num_prompt, ChunkEnds(CHUNK), _SCHEDULE
            )
            if not least <= end <= most:
                raise Failed(
                    f"a step that read a prompt of {num_prompt} tokens from {begin} on "
                    f"ended at {end}, not between {least} and {most}: vLLM does not "
                    "ask RoCo's scheduler where steps may end"
                )
    if len(reached) != len(PROMPTS):
        raise Failed(f"the trace tells of {len(reached)} of {len(PROMPTS)} requests")


def _expected_freed_blocks(steps_in_flight: int) -> range:
    """Return how many blocks the engine check may free.

    Args:
        steps_in_flight: Most steps that run at a time, the one being scheduled
            included.
    """
    # the last token is never computed, and blocks are freed when a step is scheduled:
    # all that steps before the last evicted, or less if those are still in flight
    most, least = (
        sum(_SCHEDULE.evicted_blocks(n + NUM_NEW - 1 - steps) for n in PROMPTS)
        for steps in (1, steps_in_flight)
    )
    return range(least, most + 1)
