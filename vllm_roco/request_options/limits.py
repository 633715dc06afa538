# SPDX-License-Identifier: Apache-2.0
"""Whether a request stays within what the server allows and has planned for."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_roco.eviction_row import EvictionRow
from vllm_roco.request_options.asked import Asked
from vllm_roco.request_options.error import RequestOptionError


def check_chunk(asked: Asked, chunk: int, limits: Mapping[str, int]) -> None:
    """Raise if a step has no room for a chunk of the request's own.

    Args:
        asked: What the request asks for.
        chunk: In tokens.
        limits: Most prompt tokens of one request in a step, by what sets the limit.

    Raises:
        RequestOptionError: It has none.
    """
    # the server's own may be more than a limit, where no prompt is that long
    if "chunk" not in asked or chunk <= asked.config.chunk:
        return
    over = {what: most for what, most in limits.items() if chunk > most}
    if over:
        most = max(min(over.values()), asked.config.chunk)
        most -= most % asked.block_size
        told = _listed([f"{what} ({least})" for what, least in over.items()])
        raise RequestOptionError(
            "chunk",
            chunk,
            f"chunk = {chunk} is more than a step of this server has room for "
            f"beside its other requests: more than {told}. Use at most {most}, "
            f"or ask the operator to raise {'it' if len(over) == 1 else 'them'}.",
        )


def check_protected(asked: Asked, row: EvictionRow) -> None:
    """Raise if a request could not evict down to what it keeps.

    Raises:
        RequestOptionError: More is protected than is kept.
    """
    size = asked.block_size
    protected = (asked.blocks(row.sink) + asked.blocks(row.recent)) * size
    kept = row.resident_blocks * size
    if protected > kept:
        raise RequestOptionError(
            "budget",
            asked.value("budget"),
            f"sink = {row.sink}{asked.whose('sink')} and recent = "
            f"{row.recent}{asked.whose('recent')} protect {protected} "
            f"tokens in whole blocks of {size}, more than the {kept} that are "
            "kept. Lower them, or raise budget.",
        )


def check_size(
    asked: Asked, mode: str, row: EvictionRow, num_prompt_tokens: int
) -> None:
    """Raise if a request that evicts would attend over more than is planned for.

    Args:
        asked: What the request asks for.
        mode: That holds for it.
        row: How it evicts.
        num_prompt_tokens: `P`, the prompt's length.

    Raises:
        RequestOptionError: It would.
    """
    config, size = asked.config, asked.block_size
    resident = row.resident_blocks * size
    if resident > config.max_budget:
        raise _too_much_kept(asked, mode, row, num_prompt_tokens)
    stride = row.stride_blocks * size
    most = config.max_budget + config.stride
    if resident + stride > most:
        raise RequestOptionError(
            "stride",
            stride,
            f"stride = {stride} on top of {resident} kept tokens is more than this "
            f"server plans for ({most}, its max_budget and stride). Use a stride "
            f"of at most {most - resident}.",
        )


def _too_much_kept(
    asked: Asked, mode: str, row: EvictionRow, num_prompt_tokens: int
) -> RequestOptionError:
    config, size = asked.config, asked.block_size
    resident = row.resident_blocks * size
    budget = asked.value("budget")
    prompt = asked.blocks(num_prompt_tokens) if mode == "generation" else 0
    room = config.max_budget - prompt * size
    told, allowed = f"budget = {budget}", str(room)
    if isinstance(budget, float):
        told += f" of the prompt's {num_prompt_tokens} tokens"
        told += f" ({resident - prompt * size} in whole blocks of {size})"
        allowed += " tokens"
        # a fraction keeps a block beside what is protected
        protected = asked.blocks(asked.tokens("sink", 0)) + asked.blocks(row.recent)
        thousandths = 1000 * room // num_prompt_tokens
        if room > protected * size and 0 < thousandths < 1000:
            allowed += f", or {thousandths / 1000} of this prompt"
    if mode != "generation":
        return RequestOptionError(
            "budget",
            budget,
            f"{told} is more than this server's max_budget = "
            f"{config.max_budget}. Use at most {allowed}, or ask the operator "
            "to raise max_budget.",
        )
    least = max(1, asked.blocks(row.recent)) * size
    cure = 'mode "both"'
    if resident - prompt * size > config.max_budget:
        # too much without the prompt as well
        cure += f" with a budget of at most {config.max_budget}"
    if room >= least:
        cure = f"a budget of at most {allowed}, or {cure}"
    return RequestOptionError(
        "mode",
        mode,
        f"mode = {mode!r} keeps the prompt ({num_prompt_tokens} tokens), and "
        f"{told}{asked.whose('budget')} comes on top: {resident} tokens "
        f"is more than max_budget = {config.max_budget}. Use {cure}.",
    )


def _listed(parts: list[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
