# SPDX-License-Identifier: Apache-2.0
"""Greedy generation over a live set of blocks, one sequence at a time."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from tests.oracle.options import Options
from tests.oracle.sequence import LiveSequence
from tests.oracle.victims import Block, choose_victims, find_candidates, score_blocks

_ATTENTION_NAME = "block_eviction_oracle"
# each would change which keys a query sees, or how it weighs them
_UNSUPPORTED_ARGUMENTS = ("sliding_window", "softcap", "position_bias")


@dataclasses.dataclass(frozen=True)
class Eviction:
    """What one step gave up.

    Attributes:
        num_computed_tokens: Tokens computed once the step is over.
        victims: Logical indices of the blocks that went, sorted.
        kept_blocks: Logical indices of the full blocks that live on, sorted.
        margin: How near the choice was; see `Choice`.
        blocks: Every full block that was live when the choice fell, with its scores.
    """

    num_computed_tokens: int
    victims: tuple[int, ...]
    kept_blocks: tuple[int, ...]
    margin: float
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class OracleResult:
    """A finished run.

    Attributes:
        token_ids: The generated tokens.
        token_margins: Per generated token, the largest logit minus the second largest;
            two correct computations may differ where it is near rounding error.
        evictions: In the order in which they happened.
        peak_live_tokens: The most tokens that lived on after a step.
        peak_attended_tokens: The most keys that a step attended, its own included.
    """

    token_ids: tuple[int, ...]
    token_margins: tuple[float, ...]
    evictions: tuple[Eviction, ...]
    peak_live_tokens: int
    peak_attended_tokens: int


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompt_token_ids: Sequence[int],
    options: Options,
    max_new_tokens: int,
    *,
    continuation: Sequence[int] | None = None,
) -> OracleResult:
    """Generates `max_new_tokens` tokens; an end-of-sequence token stops nothing.

    Args:
        model: A float32 decoder in eval mode on the CPU whose attention goes through
            transformers' attention interface; what it used before is restored.
        prompt_token_ids: At least one token.
        options: What is kept.
        max_new_tokens: At least 1.
        continuation: Tokens to read in place of the generated ones, at least
            `max_new_tokens - 1`; the result still holds what the model would have
            chosen after each. It keeps two runs comparable beyond a near tie.

    Raises:
        ValueError: The prompt is empty, `max_new_tokens` is below 1, `continuation` is
            too short, or the model is not in float32.
        NotImplementedError: The model's attention is of a kind not simulated here.
    """
    _check_arguments(model, prompt_token_ids, max_new_tokens, continuation)
    sequence = LiveSequence(options.block_size)
    read = list(prompt_token_ids) + list(continuation or ())
    token_ids: list[int] = []
    token_margins: list[float] = []
    evictions: list[Eviction] = []
    peak_live_tokens = peak_attended_tokens = 0

    with _oracle_attention(model):
        for before, after in options.step_ends(len(prompt_token_ids), max_new_tokens):
            logits = _run_step(model, sequence, read[before:after], before)
            peak_attended_tokens = max(peak_attended_tokens, len(sequence.positions))
            if after >= len(prompt_token_ids):
                best = logits.topk(2)
                token_ids.append(int(best.indices[0]))
                token_margins.append(float(best.values[0] - best.values[1]))
                if continuation is None:
                    read.append(token_ids[-1])
            num_victims = options.evicted_blocks(after) - options.evicted_blocks(before)
            if num_victims > 0:
                evictions.append(_evict(sequence, after, num_victims, options))
            peak_live_tokens = max(peak_live_tokens, len(sequence.positions))

    return OracleResult(
        tuple(token_ids),
        tuple(token_margins),
        tuple(evictions),
        peak_live_tokens,
        peak_attended_tokens,
    )


def _check_arguments(
    model: PreTrainedModel,
    prompt_token_ids: Sequence[int],
    max_new_tokens: int,
    continuation: Sequence[int] | None,
) -> None:
    if len(prompt_token_ids) == 0:
        raise ValueError("prompt_token_ids is empty; it needs at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: 1 or more")
    if continuation is not None and len(continuation) < max_new_tokens - 1:
        raise ValueError(
            f"continuation has {len(continuation)} tokens; "
            f"needed: max_new_tokens - 1 = {max_new_tokens - 1}"
        )
    if model.dtype != torch.float32:
        raise ValueError(f"the model is in {model.dtype}; load it with torch.float32")


def _run_step(
    model: PreTrainedModel, sequence: LiveSequence, token_ids: list[int], start: int
) -> torch.Tensor:
    """Computes a step's tokens; returns the last one's logits, float32 [vocabulary]."""
    positions = torch.arange(start, start + len(token_ids))
    sequence.begin_step(positions)
    output = model(
        input_ids=torch.tensor([token_ids]),
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=1,
        live_sequence=sequence,
    )
    if sequence.num_layers != model.config.num_hidden_layers:
        raise NotImplementedError(
            f"{type(model).__name__}: {sequence.num_layers} of "
            f"{model.config.num_hidden_layers} layers used the attention interface; "
            "the oracle needs all of them"
        )
    logits: torch.Tensor = output.logits[0, -1]
    return logits


def _evict(
    sequence: LiveSequence, num_computed_tokens: int, num_victims: int, options: Options
) -> Eviction:
    # only the newest block can be partial, and it is the last column
    indices = sequence.block_indices.tolist()
    num_full = len(indices) - (num_computed_tokens % options.block_size > 0)
    statistics = (values[:, :num_full] for values in sequence.statistics())
    blocks = score_blocks(
        indices[:num_full],
        sequence.queries_seen[:num_full],
        *statistics,
        sequence.distances(num_full),
    )
    candidates = find_candidates(blocks, num_computed_tokens, options)
    choice = choose_victims(candidates, num_victims, options, blocks)
    sequence.drop_blocks(choice.victims)
    kept = tuple(index for index in indices[:num_full] if index not in choice.victims)
    return Eviction(
        num_computed_tokens, choice.victims, kept, choice.margin, tuple(blocks)
    )


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    s_aux: torch.Tensor | None = None,
    live_sequence: LiveSequence | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attends over the live sequence, in the form that transformers calls.

    Args:
        module: The attention layer.
        query: [1, query heads, queries, head size].
        key: [1, kv heads, queries, head size].
        value: [1, kv heads, queries, head size].
        attention_mask: None: causality follows from the positions.
        scaling: Factor on the logits.
        s_aux: The model's attention sinks, [query heads].
        live_sequence: The sequence, as given to the model's forward.
        arguments: What a kind of attention adds.

    Raises:
        NotImplementedError: The model wants more than plain causal attention, or does
            not hand its forward's arguments down to its attention.
    """
    for name in _UNSUPPORTED_ARGUMENTS:
        if arguments.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__}: {name}={arguments[name]!r} is not "
                "simulated; use a model with plain causal attention"
            )
    if live_sequence is None:
        raise NotImplementedError(
            f"{type(module).__name__} does not receive its model's forward arguments"
        )
    layer_index = module.layer_idx
    assert isinstance(layer_index, int)
    output = live_sequence.attend(
        layer_index, query[0], key[0], value[0], scaling, s_aux
    )
    return output[None], None


AttentionInterface.register(_ATTENTION_NAME, _attention)


@contextlib.contextmanager
def _oracle_attention(model: PreTrainedModel) -> Iterator[None]:
    """Lends the model this module's attention."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
