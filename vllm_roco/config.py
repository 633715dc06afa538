# SPDX-License-Identifier: Apache-2.0
"""The options a user sets in `additional_config["roco"]`, and their ranges.

Pure Python: every process that reads the options (front end, engine core, workers)
builds the same frozen object from the same dictionary. What depends on the rest of
vLLM's configuration is checked in `vllm_roco.validation`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMESPACE = "roco"
"""Key of `additional_config` under which the options live."""

POLICIES = ("roco", "h2o", "random", "recent")
SHIELDS = ("contribution", "peak", "deviation")
MAX_INTEGER = 2**31 - 1
"""Tokens at most of any option: what evicts is told by numbers of 32 bits."""
MODES = ("both", "prompt", "generation", "auto", "full")
PREFIX_HITS = ("exact", "longest")
UNBOUNDED_MODES = ("prompt", "full")
"""Modes in which a sequence keeps what it generates."""

# until `__post_init__` knows the budget; an instance has a number
_FROM_BUDGET: Any = None
_LONGEST_TEXT = 100
_MOST = {"stride": 256, "chunk": 1024}
"""Tokens of an option that is left out, or the budget where that is less."""


@dataclass(frozen=True, kw_only=True)
class RocoConfig:
    """What is kept, how much of it, and at what pace prompts are read.

    Attributes:
        policy: `"roco"` keeps the blocks that any head in any layer attends to; `"h2o"`
            those that received the most attention in sum (arXiv 2306.14048, on blocks),
            `"random"` a random sample; `"recent"` the first and the newest blocks, and
            measures nothing.
        mode: What counts against the budget. `"both"`: prompt and answer.
            `"prompt"`: the prompt while it is read; what is generated is kept.
            `"generation"`: the answer; the prompt is kept. `"auto"`: as `"both"`, but a
            prompt that fits into half of the budget is kept. `"full"`: nothing, no
            block is evicted.
        shield: The statistic of RoCo's first stage: `"contribution"`, `"peak"` or
            `"deviation"` (arXiv 2402.06262 shields by deviation).
        shield_ratio: Share of the budget that the first stage shields, 0 to 1.
        budget: KV tokens kept per sequence; a multiple of the block size.
        stride: Tokens evicted at a time; a multiple of the block size. None: 256, or
            the budget where that is less.
        chunk: Most prompt tokens read per step once something is evicted; a multiple of
            the block size. None: 1024, or the budget where that is less.
        prefill_tokens: Prompt tokens of a step that are enough to fill the GPU: a step
            that has this many takes more of another prompt only if it can read that
            one to its end.
        turn_end_token_ids: Tokens that end a turn of a conversation, behind which a
            chunk may end before it has `chunk` tokens: a next turn begins there. None:
            those with which the model ends its answers. Empty: no chunk ends early.
        answer_start_token_ids: Tokens, in this order, behind which an answer begins in
            a prompt of several turns. It is then read as it was written, so that a next
            turn may begin behind it. None: those of the model's chat template. Empty:
            answers are read again.
        prefix_hits: How much of a prefix requests take over from others. `"exact"`: of
            one that evicts, only what leaves it with the blocks that reading would
            keep. `"longest"`: all that is there, answers of earlier turns included;
            what is kept, and so the answer, then depends on what others have left.
        sink: First tokens of a sequence that are never evicted.
        recent: Newest tokens of a sequence that are never evicted.
        max_budget: Most tokens that a request's own budget may keep, the prompt
            included in mode `"generation"`; a multiple of the block size. None: the
            budget.
        allow_full: Whether requests may hold all that they generate, in the modes
            `"prompt"` and `"full"`.
        agree: Whether tensor-parallel ranks choose by all heads of a layer, as one GPU
            does, and not each by its own.
        trace: File that receives one JSON line per scheduled request and step, or
            None. For looking at what the budget does, not for production.

    Raises:
        ValueError: A value is of the wrong type or out of range.
    """

    policy: str = "roco"
    mode: str = "both"
    shield: str = "contribution"
    shield_ratio: float = 1.0
    budget: int = 2048
    stride: int = _FROM_BUDGET
    chunk: int = _FROM_BUDGET
    prefill_tokens: int = 4096
    turn_end_token_ids: tuple[int, ...] | None = None
    answer_start_token_ids: tuple[int, ...] | None = None
    prefix_hits: str = "exact"
    sink: int = 16
    recent: int = 32
    max_budget: int = _FROM_BUDGET
    allow_full: bool = False
    agree: bool = True
    trace: str | None = None

    def __post_init__(self) -> None:
        _check_choice("policy", self.policy, POLICIES)
        _check_choice("mode", self.mode, MODES)
        _check_choice("shield", self.shield, SHIELDS)
        _check_choice("prefix_hits", self.prefix_hits, PREFIX_HITS)
        for key in ("turn_end_token_ids", "answer_start_token_ids"):
            if (value := getattr(self, key)) is not None:
                object.__setattr__(self, key, _token_ids(key, value))
        _check_integer("budget", self.budget, 1)
        for key, most in _MOST.items():
            if getattr(self, key) is None:
                # the class is frozen for everybody else
                object.__setattr__(self, key, min(most, self.budget))
        for key, least in _LEAST.items():
            _check_integer(key, getattr(self, key), least)
        _check_ratio("shield_ratio", self.shield_ratio)
        self._check_limits()
        if self.trace is not None and not (
            isinstance(self.trace, str) and self.trace.strip()
        ):
            raise _bad("trace", self.trace, "a file path, or null for no trace")
        if self.sink + self.recent > self.budget:
            raise ValueError(
                f"roco: sink + recent is {self.sink} + {self.recent} = "
                f"{self.sink + self.recent} tokens, but must not exceed budget = "
                f"{self.budget}. Lower sink or recent, or raise budget."
            )

    def _check_limits(self) -> None:
        if self.max_budget is None:
            object.__setattr__(self, "max_budget", self.budget)
        _check_integer("max_budget", self.max_budget, self.budget)
        for key in ("allow_full", "agree"):
            if not isinstance(getattr(self, key), bool):
                raise _bad(key, getattr(self, key), "true or false")
        if self.mode in UNBOUNDED_MODES and not self.allow_full:
            raise ValueError(
                f"roco: mode = {self.mode!r} keeps all that is generated, which this "
                "server does not allow. Set allow_full to true, or use mode "
                '"both", "generation" or "auto".'
            )
        if self.mode == "generation" and self.max_budget == self.budget:
            raise ValueError(
                "roco: mode = 'generation' keeps the prompt, and budget = "
                f"{self.budget} comes on top: no prompt fits in max_budget = "
                f"{self.max_budget}. Raise max_budget by the longest prompt to serve."
            )

    @classmethod
    def from_additional_config(cls, additional_config: object) -> RocoConfig:
        """Read the options from `VllmConfig.additional_config`.

        Args:
            additional_config: The dictionary that vLLM hands through. Keys other than
                `"roco"` belong to other plugins and are left alone.

        Raises:
            ValueError: An unknown key, or a value that is not allowed.
        """
        options: Any = {}
        if isinstance(additional_config, Mapping):
            options = additional_config.get(NAMESPACE, {})
        if not isinstance(options, Mapping):
            raise ValueError(
                f"roco: additional_config['roco'] is {spell(options)}, but must be a "
                "dictionary of options, for example "
                '{"roco": {"budget": 2048, "stride": 256}}.'
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                raise ValueError(
                    f"roco: unknown option {spell(key)} = {spell(options[key])}. "
                    f"Allowed keys are {', '.join(known)}. Correct or remove it."
                )
        return cls(**options)

    @property
    def measures(self) -> bool:
        """Whether attention statistics are kept (not so for `policy="recent"`)."""
        return self.policy != "recent"

    @property
    def most_kept(self) -> int | None:
        """Most tokens that evictions leave of a request without options.

        The longest prompt that is served counts in mode `"generation"`. None where a
        sequence keeps what it generates, so that its length alone is a bound.
        """
        if self.mode in UNBOUNDED_MODES:
            return None
        return self.max_budget if self.mode == "generation" else self.budget

    def check_block_size(self, block_size: int) -> None:
        """Raise unless budget, stride and chunk are whole blocks.

        Args:
            block_size: Tokens per KV block, `CacheConfig.block_size`.

        Raises:
            ValueError: An option does not fit the block size, or the protected blocks
                leave nothing to evict.
        """
        check_whole_blocks(
            block_size,
            budget=self.budget,
            stride=self.stride,
            chunk=self.chunk,
            max_budget=self.max_budget,
        )
        protected = (
            blocks_of(self.sink, block_size) + blocks_of(self.recent, block_size)
        ) * block_size
        if protected > self.budget:
            raise ValueError(
                f"roco: sink = {self.sink} and recent = {self.recent} protect "
                f"{protected} tokens when rounded up to blocks of {block_size}, but "
                f"must not exceed budget = {self.budget}. Lower them, raise budget, "
                "or use a smaller --block-size."
            )


def check_whole_blocks(block_size: int, **options: int) -> None:
    """Raise unless every option is a multiple of the block size.

    vLLM enlarges the blocks of a model with several kinds of layers after it has asked
    for the options' check, so a spec asks again with the size that it gets.

    Args:
        block_size: Tokens per KV block.
        **options: Names of options and their tokens.

    Raises:
        ValueError: An option does not fit the block size.
    """
    for key, value in options.items():
        if trouble := whole_blocks_trouble(block_size, key, value):
            raise ValueError(f"roco: {trouble}, or another --block-size.")


def whole_blocks_trouble(block_size: int, key: str, value: int) -> str | None:
    """Return why tokens are no whole blocks, and which would be; None if they are.

    Args:
        block_size: Tokens per KV block.
        key: Name of the option.
        value: Its tokens.

    Returns:
        Two sentences, of which the second has no end yet.
    """
    below = value // block_size * block_size
    if below == value:
        return None
    near = below + block_size
    choice = f"{below} or {near}" if below else f"{near}"
    return (
        f"{key} = {value} is not a multiple of the block size ({block_size} tokens). "
        f"Use {choice}"
    )


def blocks_of(tokens: int, block_size: int) -> int:
    """Return how many blocks hold `tokens` tokens, the last one perhaps in part."""
    return -(-tokens // block_size)


_LEAST = {"stride": 1, "chunk": 1, "prefill_tokens": 1, "sink": 0, "recent": 0}


def spell(value: object) -> str:
    """Return a value as a message can hold it, whatever was sent."""
    try:
        text = repr(value)
    # a number of too many digits; lists in lists in lists
    except (ValueError, RecursionError):
        text = f"<{type(value).__name__}, too long to print>"
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def _bad(key: str, value: object, allowed: str) -> ValueError:
    return ValueError(
        f"roco: {key} = {spell(value)} is not allowed. Use {allowed} "
        f'(--additional-config \'{{"roco": {{"{key}": ...}}}}\').'
    )


def _check_choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise _bad(key, value, " or ".join(f'"{name}"' for name in allowed))


def is_integer(value: object, least: int) -> bool:
    """Return whether an option is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_ratio(value: object) -> bool:
    """Return whether an option is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # so is nan refused
    return 0 <= value <= 1


def _check_integer(key: str, value: Any, least: int) -> None:
    if not is_integer(value, least):
        raise _bad(key, value, f"a whole number of tokens, at least {least}")
    if value > MAX_INTEGER:
        raise _bad(key, value, f"a whole number of tokens, at most {MAX_INTEGER}")


def _token_ids(key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(
        is_integer(token, 0) and token <= MAX_INTEGER for token in value
    ):
        raise _bad(key, value, "a list of token ids, or null for those of the model")
    return tuple(value)


def _check_ratio(key: str, value: object) -> None:
    if not is_ratio(value):
        raise _bad(key, value, "a number from 0 to 1")
