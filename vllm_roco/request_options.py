# SPDX-License-Identifier: Apache-2.0
"""The options that a request brings with it, and the row that comes of them.

Pure Python, and a function of the request alone: front ends check with it, the
scheduler plans with it.

Over HTTP the options are `vllm_xargs`, offline `SamplingParams.extra_args`: either one
key for each, `{"roco_budget": 512}`, or one for all, `{"roco": {"budget": 512}}`, whose
value may be a JSON string, for HTTP carries no nested dictionary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from vllm_roco.config import (
    MODES,
    NAMESPACE,
    POLICIES,
    SHIELDS,
    UNBOUNDED_MODES,
    RocoConfig,
    blocks_of,
    is_integer,
    is_ratio,
    whole_blocks_trouble,
)
from vllm_roco.eviction_row import (
    SCORE_MEAN,
    SCORE_NONE,
    SCORE_RANDOM,
    SCORE_SUM,
    SHIELD_BY_DEVIATION,
    EvictionRow,
)
from vllm_roco.eviction_schedule import NEVER

PREFIX = f"{NAMESPACE}_"
OPTIONS = (
    *("budget", "stride", "chunk", "sink", "recent"),
    *("shield", "shield_ratio", "policy", "seed", "mode"),
)
"""What a request may bring."""

FULL = "full"
_SCORES = {
    "roco": SCORE_MEAN,
    "h2o": SCORE_SUM,
    "random": SCORE_RANDOM,
    "recent": SCORE_NONE,
}
_OF_EVICTION = (
    *("stride", "sink", "recent"),
    *("shield", "shield_ratio", "policy", "seed"),
)
"""What a request that evicts nothing has no use for."""

_READERS = {"shield": "roco", "shield_ratio": "roco", "seed": "random"}
"""The policy that reads an option, of those that not all read."""

_CHOICES = {"mode": MODES, "policy": POLICIES, "shield": SHIELDS}
_MAX_INTEGER = 2**31 - 1
_LONGEST_TEXT = 100


class RequestOptionError(ValueError):
    """A request asks for what it cannot have; the others are not concerned.

    Attributes:
        parameter: The key of `extra_args` that it is about, in the form of one key for
            each option.
        value: What was asked for; as text what cannot be printed, or only at length.
    """

    def __init__(self, option: str, value: object, message: str) -> None:
        super().__init__(f"roco: {message}")
        self.parameter = PREFIX + option if option in OPTIONS else NAMESPACE
        is_short = isinstance(value, int | float) and abs(value) <= _MAX_INTEGER
        self.value = value if is_short else _spell(value)


class RequestPlan(NamedTuple):
    """What holds for a request.

    Attributes:
        row: How it evicts.
        chunk: Prompt tokens that it reads per step once something is evicted.
    """

    row: EvictionRow
    chunk: int


def options_in(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options that a request brings, by name; nothing is checked but names.

    Args:
        extra_args: `SamplingParams.extra_args`; keys of others are left alone.

    Raises:
        RequestOptionError: An unknown key, or both forms at once.
    """
    if not extra_args:
        return {}
    flat = {
        key.removeprefix(PREFIX): value
        for key, value in extra_args.items()
        if isinstance(key, str) and key.startswith(PREFIX)
    }
    if NAMESPACE not in extra_args:
        return _known(flat)
    nested = extra_args[NAMESPACE]
    if flat:
        raise RequestOptionError(
            NAMESPACE,
            nested,
            f"the request has both {NAMESPACE} = {_spell(nested)} and "
            f"{PREFIX}{next(iter(flat))}. Use one form for all options.",
        )
    if isinstance(nested, str):
        try:
            nested = json.loads(nested)
        # the second for lists in lists in lists
        except (ValueError, RecursionError) as error:
            raise _not_a_dictionary(nested) from error
    if not isinstance(nested, Mapping):
        raise _not_a_dictionary(nested)
    return _known(dict(nested))


def _not_a_dictionary(value: object) -> RequestOptionError:
    return RequestOptionError(
        NAMESPACE,
        value,
        f"{NAMESPACE} = {_spell(value)} is not a dictionary of options. Use one, over "
        'HTTP as a JSON string, for example "{\\"budget\\": 512}", or one key for each '
        f"option, for example {PREFIX}budget.",
    )


def _known(options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if name not in OPTIONS:
            raise RequestOptionError(
                NAMESPACE,
                value,
                f"unknown option {_spell(name)} = {_spell(value)} in a request. "
                "Allowed are "
                f"{', '.join(OPTIONS)}. Correct or remove it.",
            )
    return options


@dataclass(frozen=True)
class RequestPlanner:
    """Turns options of requests into rows.

    Attributes:
        config: The server's options, which are the defaults and the limits.
        block_size: Tokens per KV block.
        chunk_limits: Most prompt tokens of one request in a step, by what sets the
            limit, in words for the operator.
    """

    config: RocoConfig
    block_size: int
    chunk_limits: Mapping[str, int] = field(default_factory=dict)

    def plan(
        self, extra_args: Mapping[str, Any] | None, num_prompt_tokens: int
    ) -> RequestPlan:
        """Return what holds for a request.

        Args:
            extra_args: `SamplingParams.extra_args`.
            num_prompt_tokens: `P`, the prompt's length.

        Raises:
            RequestOptionError: The request asks for what it cannot have.
        """
        asked = options_in(extra_args)
        for name, allowed in _CHOICES.items():
            value = asked.get(name, allowed[0])
            if not isinstance(value, str) or value not in allowed:
                choice = " or ".join(f'"{name}"' for name in allowed)
                raise _bad(name, value, choice)
        mode = self._mode(asked)
        sink = self._tokens(asked, "sink", 0)
        recent = self._tokens(asked, "recent", 0)
        protected = self._blocks(sink) + self._blocks(recent)
        # nothing is ever compared with the budget of a request that keeps everything
        budget = self._blocks(self.config.budget)
        if mode != FULL:
            budget = self._budget(asked, num_prompt_tokens, protected)
        stride = self._tokens(asked, "stride", 1, min_of=budget) // self.block_size
        chunk = self._chunk(asked, budget)
        resident, prompt = budget, self._blocks(num_prompt_tokens)
        if mode == "generation":
            resident += prompt
        if mode == "generation" or (
            # a short question stays whole
            mode == "auto"
            and prompt <= budget // 2
            and max(self._blocks(sink), prompt) + self._blocks(recent) <= budget
        ):
            sink = max(sink, num_prompt_tokens)
        until = {FULL: 0, "prompt": num_prompt_tokens}.get(mode, NEVER)
        flags, shield_blocks = self._choice_of_blocks(asked, budget)
        seed = _seed(asked)
        self._check_uses(asked, mode)
        row = EvictionRow(
            resident, stride, until, sink, recent, shield_blocks, flags, seed
        )
        if mode != FULL:
            # also where this prompt is too short for it to matter: a longer one is not
            self._check_protected(asked, row)
            self._check_size(asked, mode, row, num_prompt_tokens)
        if mode == "prompt" and not row.schedule(self.block_size).evicted_blocks(until):
            row = row._replace(until=0)
        return RequestPlan(row, chunk)

    def _mode(self, asked: Mapping[str, Any]) -> str:
        budget = asked.get("budget")
        if "mode" in asked:
            mode: str = asked["mode"]
        elif budget == FULL:
            mode = FULL
        elif "budget" in asked and self.config.mode == FULL:
            # who brings a budget where nothing is evicted wants evictions
            mode = MODES[0]
        else:
            mode = self.config.mode
        if budget == FULL and mode != FULL:
            raise RequestOptionError(
                "mode",
                mode,
                f'budget = "full" keeps everything, and mode = {mode!r} does not. '
                "Leave one of them out.",
            )
        if mode == FULL and "budget" in asked and budget != FULL:
            raise RequestOptionError(
                "budget",
                budget,
                f"mode = 'full' keeps everything, and budget = {_spell(budget)} does "
                "not. Leave one of them out.",
            )
        if mode in UNBOUNDED_MODES and not self.config.allow_full:
            key = "mode" if "mode" in asked else "budget"
            raise RequestOptionError(
                key,
                mode,
                f"{key} = {mode!r} is not allowed by this server (allow_full). Use "
                'mode "both", "generation" or "auto", or ask the operator.',
            )
        return mode

    def _budget(
        self, asked: Mapping[str, Any], num_prompt_tokens: int, protected: int
    ) -> int:
        """Return the budget in blocks."""
        budget = asked.get("budget", self.config.budget)
        if isinstance(budget, float) and 0 < budget < 1:
            least = (protected + 1) * self.block_size
            if least > self.config.max_budget:
                raise RequestOptionError(
                    "budget",
                    budget,
                    f"sink and recent alone keep {least - self.block_size} tokens in "
                    f"whole blocks of {self.block_size}, and a budget of {budget} of "
                    "the prompt keeps a block more, which is more than this server's "
                    f"max_budget = {self.config.max_budget}. Lower sink or recent.",
                )
            # as it is written: in binary, 0.07 of 1,600 is more than 112
            tokens = Fraction(repr(budget)) * num_prompt_tokens
            return max(math.ceil(tokens / self.block_size), protected + 1)
        if not is_integer(budget, 1):
            raise _bad(
                "budget",
                budget,
                "a whole number of tokens, at least 1, a fraction of the prompt "
                'between 0 and 1, or "full"',
            )
        if budget > _MAX_INTEGER:
            raise _bad("budget", budget, f"at most {self.config.max_budget}")
        self._check_whole_blocks("budget", budget)
        return int(budget) // self.block_size

    def _chunk(self, asked: Mapping[str, Any], budget: int) -> int:
        chunk = self._tokens(asked, "chunk", 1, min_of=budget)
        # the server's own may be more than a limit, where no prompt is that long
        if "chunk" not in asked or chunk <= self.config.chunk:
            return chunk
        over = {what: most for what, most in self.chunk_limits.items() if chunk > most}
        if over:
            most = max(min(over.values()), self.config.chunk)
            most -= most % self.block_size
            limits = _listed([f"{what} ({least})" for what, least in over.items()])
            raise RequestOptionError(
                "chunk",
                chunk,
                f"chunk = {chunk} is more than a step of this server has room for "
                f"beside its other requests: more than {limits}. Use at most {most}, "
                f"or ask the operator to raise {'it' if len(over) == 1 else 'them'}.",
            )
        return chunk

    def _tokens(
        self, asked: Mapping[str, Any], name: str, least: int, min_of: int | None = None
    ) -> int:
        """Return an option in tokens; by default at most the request's own budget.

        Args:
            asked: What the request brings.
            name: Of the option.
            least: That is allowed.
            min_of: The budget in blocks, if it bounds the option's default.
        """
        if name not in asked:
            tokens = int(getattr(self.config, name))
            if min_of is None or "budget" not in asked:
                return tokens
            return min(tokens, min_of * self.block_size)
        tokens = asked[name]
        if not is_integer(tokens, least):
            raise _bad(name, tokens, f"a whole number of tokens, at least {least}")
        if tokens > _MAX_INTEGER:
            raise _bad(name, tokens, f"at most {_MAX_INTEGER}")
        if min_of is not None:
            self._check_whole_blocks(name, tokens)
        return int(tokens)

    def _choice_of_blocks(
        self, asked: Mapping[str, Any], budget: int
    ) -> tuple[int, int]:
        """Return the row's flags, and how many blocks are shielded."""
        policy = asked.get("policy", self.config.policy)
        if not self.config.measures and policy != self.config.policy:
            raise RequestOptionError(
                "policy",
                policy,
                f"policy = {policy!r} is not served here: the server runs policy "
                f"{self.config.policy!r}, which keeps no statistics. Leave policy out.",
            )
        ratio = asked.get("shield_ratio", self.config.shield_ratio)
        if not is_ratio(ratio):
            raise _bad("shield_ratio", ratio, "a number from 0 to 1")
        flags = _SCORES[policy]
        # the shield is the paper's; the other policies have one stage
        if policy != "roco":
            return flags, 0
        if asked.get("shield", self.config.shield) == "deviation":
            flags |= SHIELD_BY_DEVIATION
        return flags, int(ratio * budget)

    def _check_uses(self, asked: Mapping[str, Any], mode: str) -> None:
        """Raise if an option would do nothing, and is not the server's own anyway."""
        policy = asked.get("policy", self.config.policy)
        for name, value in asked.items():
            if value == (0 if name == "seed" else getattr(self.config, name)):
                continue
            if mode == FULL and name in _OF_EVICTION:
                why = "nothing is evicted: "
                if "mode" in asked:
                    why += "mode = 'full'"
                elif "budget" in asked:
                    why += "budget = 'full'"
                else:
                    why += "mode = 'full' (the server's default)"
                other = "ask for a mode that evicts"
            elif policy != (reader := _READERS.get(name, policy)):
                why = f"policy = {policy!r}{self._whose(asked, 'policy')} does not "
                why += "read it"
                other = f'use policy "{reader}"' if self.config.measures else ""
            else:
                continue
            cure = f"Leave {name} out{f', or {other}' if other else ''}."
            raise RequestOptionError(
                name,
                value,
                f"{name} = {_spell(value)} would do nothing, for {why}. {cure}",
            )

    def _check_whole_blocks(self, name: str, tokens: int) -> None:
        if trouble := whole_blocks_trouble(self.block_size, name, tokens):
            raise RequestOptionError(name, tokens, f"{trouble}.")

    def _check_protected(self, asked: Mapping[str, Any], row: EvictionRow) -> None:
        """Raise if a request could not evict down to what it keeps."""
        size = self.block_size
        protected = (self._blocks(row.sink) + self._blocks(row.recent)) * size
        kept = row.resident_blocks * size
        if protected > kept:
            raise RequestOptionError(
                "budget",
                asked.get("budget", self.config.budget),
                f"sink = {row.sink}{self._whose(asked, 'sink')} and recent = "
                f"{row.recent}{self._whose(asked, 'recent')} protect {protected} "
                f"tokens in whole blocks of {size}, more than the {kept} that are "
                "kept. Lower them, or raise budget.",
            )

    def _check_size(
        self,
        asked: Mapping[str, Any],
        mode: str,
        row: EvictionRow,
        num_prompt_tokens: int,
    ) -> None:
        """Raise if a request that evicts would attend over more than is planned for."""
        config, size = self.config, self.block_size
        resident = row.resident_blocks * size
        if resident > config.max_budget:
            budget = asked.get("budget", config.budget)
            prompt = self._blocks(num_prompt_tokens) if mode == "generation" else 0
            room = config.max_budget - prompt * size
            told, allowed = f"budget = {budget}", str(room)
            if isinstance(budget, float):
                told += f" of the prompt's {num_prompt_tokens} tokens"
                told += f" ({resident - prompt * size} in whole blocks of {size})"
                allowed += " tokens"
                # a fraction keeps a block beside what is protected
                protected = self._blocks(self._tokens(asked, "sink", 0))
                protected += self._blocks(row.recent)
                thousandths = 1000 * room // num_prompt_tokens
                if room > protected * size and 0 < thousandths < 1000:
                    allowed += f", or {thousandths / 1000} of this prompt"
            if mode != "generation":
                raise RequestOptionError(
                    "budget",
                    budget,
                    f"{told} is more than this server's max_budget = "
                    f"{config.max_budget}. Use at most {allowed}, or ask the operator "
                    "to raise max_budget.",
                )
            least = max(1, self._blocks(row.recent)) * size
            cure = (
                f"a budget of at most {allowed}, or mode" if room >= least else "mode"
            )
            raise RequestOptionError(
                "mode",
                mode,
                f"mode = {mode!r} keeps the prompt ({num_prompt_tokens} tokens), and "
                f"{told}{self._whose(asked, 'budget')} comes on top: {resident} tokens "
                f'is more than max_budget = {config.max_budget}. Use {cure} "both".',
            )
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

    def _whose(self, asked: Mapping[str, Any], name: str) -> str:
        return "" if name in asked else " (the server's default)"

    def _blocks(self, tokens: int) -> int:
        return blocks_of(tokens, self.block_size)


def _listed(parts: list[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _seed(asked: Mapping[str, Any]) -> int:
    seed = asked.get("seed", 0)
    if not is_integer(seed, 0) or seed > _MAX_INTEGER:
        raise _bad("seed", seed, f"a whole number from 0 to {_MAX_INTEGER}")
    return int(seed)


def _bad(name: str, value: object, allowed: str) -> RequestOptionError:
    return RequestOptionError(
        name,
        value,
        f"{name} = {_spell(value)} is not allowed in a request. Use {allowed}.",
    )


def _spell(value: object) -> str:
    """Return a value as a message can hold it, whatever a client has sent."""
    try:
        text = repr(value)
    # a number of too many digits; lists in lists in lists
    except (ValueError, RecursionError):
        text = f"<{type(value).__name__}, too long to print>"
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
