# SPDX-License-Identifier: Apache-2.0
"""What of vLLM's settings and of a model's configuration goes together with RoCo.

Each check names what is wrong, the value, what is allowed and what to do. Options among
themselves are `config`'s affair; refusals that need a layer (its window, say) are in
`vllm_roco.attention`, those that need the cache's size in `planning_scheduler`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_roco import fp8_cache
from vllm_roco.backend_name import BACKEND_NAME
from vllm_roco.config import RocoConfig
from vllm_roco.request_options.planner import RequestPlanner

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.cache import CacheDType

KERNEL_BLOCK_SIZE = 16
"""Tokens. Block sizes are multiples of it, so that RoCo sees vLLM's own blocks."""

_OWN_BACKEND = ("MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM", "MiMoV2OmniForCausalLM")
"""Architectures whose layers never ask for the backend that the user named."""

KV_CACHE_DTYPES: tuple[CacheDType, ...] = (
    *("auto", "float16", "bfloat16"),
    *fp8_cache.CACHE_DTYPES,
)
"""What `--kv-cache-dtype` may be."""

OTHER_KV_CACHE_DTYPE = (
    "Use --kv-cache-dtype bfloat16, or fp8, also where the checkpoint asks for another"
)
"""What to do about the others, which a checkpoint can choose as well."""


def is_selected(vllm_config: VllmConfig) -> bool:
    """Return whether any layer may use the RoCo backend."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *attention.backend_per_kind.values()]
    return any(member is not None and member.name == BACKEND_NAME for member in chosen)


def has_windows(vllm_config: VllmConfig) -> bool:
    """Return whether the model may have sliding-window layers beside others."""
    model = vllm_config.model_config
    return model is not None and model.get_sliding_window() is not None


def check_windows(vllm_config: VllmConfig) -> None:
    """Refuse what a model with sliding-window layers cannot be served with.

    Raises:
        NotImplementedError: Every layer has a window.
        ValueError: Layers of several kinds are to have caches of one kind.
    """
    _refuse_windows_alone(vllm_config)
    _refuse_one_kind_of_cache(vllm_config)


def _refuse_one_kind_of_cache(vllm_config: VllmConfig) -> None:
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "roco: disable_hybrid_kv_cache_manager = True is not allowed for a model "
            "with sliding-window layers beside layers that keep a budget: their caches "
            "are of different kinds. Leave --disable-hybrid-kv-cache-manager out."
        )


def validated_config(vllm_config: VllmConfig) -> RocoConfig:
    """Read the options and refuse what does not go together with RoCo.

    Args:
        vllm_config: As vLLM has it in any process, with or without a final block size.

    Raises:
        ValueError: An option, or a vLLM setting that must be changed.
        NotImplementedError: A feature of vLLM that RoCo does not support.
    """
    config = RocoConfig.from_additional_config(vllm_config.additional_config)
    _refuse_features(vllm_config)
    _refuse_models(vllm_config)
    _check_scheduling(vllm_config, config)
    if vllm_config.cache_config.enable_prefix_caching and has_windows(vllm_config):
        check_prefix_hits_beside_windows(config)
    if vllm_config.cache_config.user_specified_block_size:
        _check_block_size(vllm_config.cache_config.block_size, config)
    return config


def request_planner(vllm_config: VllmConfig, block_size: int) -> RequestPlanner:
    """Return what turns options of requests into rows.

    Args:
        vllm_config: As vLLM has it in any process.
        block_size: Tokens per block of the layers that evict.

    Raises:
        ValueError: As in `validated_config`.
        NotImplementedError: Likewise.
    """
    scheduler = vllm_config.scheduler_config
    limits = {}
    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        if (tokens := getattr(scheduler, name)) is not None:
            limits[f"{_flag(name)} less --max-num-seqs"] = (
                tokens - scheduler.max_num_seqs
            )
    if threshold := scheduler.long_prefill_token_threshold:
        limits[_flag("long_prefill_token_threshold")] = threshold
    return RequestPlanner(
        config=validated_config(vllm_config),
        block_size=block_size,
        chunk_limits=limits,
    )


def _flag(name: str) -> str:
    """Return how a setting is called on the command line."""
    return f"--{name.replace('_', '-')}"


def _refuse(what: str, value: object, instead: str) -> NotImplementedError:
    return NotImplementedError(
        f"roco: {what} = {value!r} is not supported. {instead}, or use another "
        "--attention-backend."
    )


def _refuse_features(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    kinds = vllm_config.attention_config.backend_per_kind
    for kind, backend in kinds.items():
        if kind != "full_attention" and backend and backend.name == BACKEND_NAME:
            raise _refuse(
                f"backend_per_kind.{kind}",
                backend.name,
                "Leave it out: RoCo keeps a budget in layers of full attention, and "
                "leaves others to the backend that vLLM chooses for them",
            )
    if (speculative := vllm_config.speculative_config) is not None:
        raise _refuse(
            "speculative_config", speculative.method, "Leave --speculative-config out"
        )
    if cache.kv_offloading_size is not None:
        # vLLM makes a KV connector of it only after the platform has seen the settings
        raise _refuse(
            "kv_offloading_size",
            cache.kv_offloading_size,
            "Leave --kv-offloading-size out",
        )
    if (transfer := vllm_config.kv_transfer_config) is not None:
        raise _refuse(
            "kv_transfer_config",
            transfer.kv_connector,
            "Leave --kv-transfer-config and KV offloading out",
        )
    if vllm_config.aux_output_config.enable_return_routed_experts:
        # kept for as many tokens as the KV cache has room for, and a running sequence
        # may be longer
        raise _refuse(
            "enable_return_routed_experts",
            True,
            "Leave --enable-return-routed-experts out",
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            raise _refuse(name, size, "Use 1")
    if parallel.enable_dbo:
        raise _refuse("enable_dbo", True, "Leave --enable-dbo out")
    if parallel.ubatch_size > 1:
        raise _refuse("ubatch_size", parallel.ubatch_size, "Use 0")
    if cache.cache_dtype not in KV_CACHE_DTYPES:
        raise _refuse("kv_cache_dtype", cache.cache_dtype, OTHER_KV_CACHE_DTYPE)
    if skipped := cache.kv_cache_dtype_skip_layers:
        raise _refuse(
            "kv_cache_dtype_skip_layers",
            skipped,
            "Leave --kv-cache-dtype-skip-layers out",
        )
    if cache.kv_sharing_fast_prefill:
        raise _refuse(
            "kv_sharing_fast_prefill", True, "Leave --kv-sharing-fast-prefill out"
        )


def _refuse_models(vllm_config: VllmConfig) -> None:
    model = vllm_config.model_config
    if model is None:
        return
    if model.runner_type != "generate":
        raise _refuse("runner", model.runner_type, "Serve a model that generates text")
    if model.is_mm_prefix_lm:
        # vLLM drops this where a deployment takes text alone
        raise NotImplementedError(
            f"roco: model = {model.model!r} attends to multimodal inputs in both "
            "directions, which is not supported. Serve its text alone with "
            "--language-model-only, or use another --attention-backend."
        )
    reasons = {
        "is an encoder-decoder model": model.is_encoder_decoder,
        "has multi-head latent attention (MLA)": model.use_mla,
        "has no attention layers": model.is_attention_free,
        # hundreds of tokens, and evicting is of whole blocks
        "has state-space (Mamba) or linear-attention layers, beside which vLLM makes "
        "blocks of attention as large as a whole state": model.is_hybrid,
        "has chunked-local attention": model.attention_chunk_size is not None,
        "has layers that bring an attention backend of their own": bool(
            set(model.architectures) & set(_OWN_BACKEND)
        ),
        "is a diffusion model": vllm_config.diffusion_config is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise NotImplementedError(
                f"roco: model = {model.model!r} {reason}, which is not supported. "
                "Serve a model with layers of full attention, or use another "
                "--attention-backend."
            )
    # here as well as in `check_windows`: vLLM remembers which backend serves a layer,
    # and does not ask again for a later engine of the process
    _refuse_windows_alone(vllm_config)
    if has_windows(vllm_config):
        _refuse_one_kind_of_cache(vllm_config)


def _refuse_windows_alone(vllm_config: VllmConfig) -> None:
    # vLLM sets it only if the window holds for all layers that name no other
    window = vllm_config.cache_config.sliding_window
    if window is None:
        return
    instead = (
        "Leave --attention-backend roco out, or serve a model with layers of full "
        "attention."
    )
    longest = vllm_config.model_config.max_model_len
    if window >= longest:
        instead = (
            f"No sequence is longer than {longest} tokens, so the window changes "
            "nothing: with --disable-sliding-window the layers have full attention."
        )
    raise NotImplementedError(
        f"roco: every layer of the model has a sliding window of {window} tokens, so "
        f"its KV cache is bounded already and there is nothing to evict. {instead}"
    )


def check_prefix_hits_beside_windows(config: RocoConfig) -> None:
    """Refuse hits that there are not where other layers have sliding windows.

    Raises:
        NotImplementedError: They are asked for.
    """
    if config.prefix_hits == "longest":
        raise NotImplementedError(
            f"roco: prefix_hits = {config.prefix_hits!r} is not supported for models "
            "with sliding-window layers, which do not keep what an answer ends with. "
            'Use prefix_hits "exact", or --no-enable-prefix-caching.'
        )


def _check_block_size(block_size: int, config: RocoConfig) -> None:
    if block_size % KERNEL_BLOCK_SIZE:
        raise ValueError(
            f"roco: block_size = {block_size} is not a multiple of "
            f"{KERNEL_BLOCK_SIZE} tokens. Leave --block-size out, or use 16, 32, 64 or "
            "128."
        )
    config.check_block_size(block_size)


def _check_scheduling(vllm_config: VllmConfig, config: RocoConfig) -> None:
    scheduler = vllm_config.scheduler_config
    chunk = config.chunk
    if vllm_config.model_config is not None:
        # no prompt is longer, for it leaves room for a token of the answer
        chunk = min(chunk, vllm_config.model_config.max_model_len - 1)
    if not scheduler.enable_chunked_prefill:
        raise ValueError(
            "roco: enable_chunked_prefill = False is not allowed: prompts are read in "
            f"chunks of {config.chunk} tokens. Leave --no-enable-chunked-prefill out."
        )
    if scheduler.disable_chunked_mm_input and scheduler.is_multimodal_model:
        raise ValueError(
            "roco: disable_chunked_mm_input = True is not allowed: prompts are read in "
            f"chunks of {config.chunk} tokens, which end inside images too. Leave "
            "--disable-chunked-mm-input out."
        )
    threshold = scheduler.long_prefill_token_threshold
    if 0 < threshold < chunk:
        raise ValueError(
            f"roco: long_prefill_token_threshold = {threshold} would cut prompt "
            f"chunks of {chunk} tokens short. Leave it out, use at least "
            f"{chunk}, or lower roco's chunk to at most {threshold}."
        )
    needed = scheduler.max_num_seqs + chunk
    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        limit = getattr(scheduler, name)
        if limit is not None and limit < needed:
            raise ValueError(
                f"roco: {name} = {limit} is less than max_num_seqs + chunk = "
                f"{scheduler.max_num_seqs} + {chunk} = {needed}, so running "
                "sequences could keep prompts waiting for ever. Use "
                f"{_flag(name)} {needed} or more, or lower "
                "--max-num-seqs or roco's chunk."
            )
