# SPDX-License-Identifier: Apache-2.0
"""What one request asks for, option by option, with the server's where it is silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_roco.config import (
    MAX_INTEGER,
    MODES,
    POLICIES,
    SHIELDS,
    RocoConfig,
    blocks_of,
    is_integer,
    is_ratio,
    whole_blocks_trouble,
)
from vllm_roco.request_options.error import (
    RequestOptionError,
    not_allowed,
)

_CHOICES = {"mode": MODES, "policy": POLICIES, "shield": SHIELDS}


@dataclass(frozen=True)
class Asked:
    """One request's options beside the server's.

    Attributes:
        options: What the request brings, by name.
        config: The server's options.
        block_size: Tokens per KV block.

    Raises:
        RequestOptionError: A word is none of those that its option can have.
    """

    options: Mapping[str, Any]
    config: RocoConfig
    block_size: int

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = self.options.get(name, allowed[0])
            if not isinstance(value, str) or value not in allowed:
                choice = " or ".join(f'"{name}"' for name in allowed)
                raise not_allowed(name, value, choice)

    def __contains__(self, name: str) -> bool:
        return name in self.options

    def value(self, name: str) -> Any:
        """Return an option as it was written, the server's if it is left out."""
        return self.options.get(name, getattr(self.config, name))

    def whose(self, name: str) -> str:
        """Return what a message says behind an option's value."""
        return "" if name in self else " (the server's default)"

    def tokens(self, name: str, least: int, min_of: int | None = None) -> int:
        """Return an option in tokens; by default at most the request's own budget.

        Args:
            name: Of the option.
            least: That is allowed.
            min_of: The budget in blocks, if it bounds the option's default.

        Raises:
            RequestOptionError: It is no such number, or no whole blocks where it has
                to be.
        """
        if name not in self:
            tokens = int(getattr(self.config, name))
            if min_of is None or "budget" not in self:
                return tokens
            return min(tokens, min_of * self.block_size)
        tokens = self.options[name]
        if not is_integer(tokens, least):
            raise not_allowed(
                name, tokens, f"a whole number of tokens, at least {least}"
            )
        if tokens > MAX_INTEGER:
            raise not_allowed(name, tokens, f"at most {MAX_INTEGER}")
        if min_of is not None:
            self.check_whole_blocks(name, tokens)
        return int(tokens)

    def ratio(self, name: str) -> float:
        """Return an option that is a number from 0 to 1.

        Raises:
            RequestOptionError: It is none.
        """
        ratio = self.value(name)
        if not is_ratio(ratio):
            raise not_allowed(name, ratio, "a number from 0 to 1")
        return float(ratio)

    def seed(self) -> int:
        """Return the seed, 0 if it is left out.

        Raises:
            RequestOptionError: It is no number of a row.
        """
        seed = self.options.get("seed", 0)
        if not is_integer(seed, 0) or seed > MAX_INTEGER:
            raise not_allowed("seed", seed, f"a whole number from 0 to {MAX_INTEGER}")
        return int(seed)

    def blocks(self, tokens: int) -> int:
        """Return how many blocks hold so many tokens."""
        return blocks_of(tokens, self.block_size)

    def check_whole_blocks(self, name: str, tokens: int) -> None:
        """Raise unless an option's tokens are whole blocks.

        Raises:
            RequestOptionError: They are not.
        """
        if trouble := whole_blocks_trouble(self.block_size, name, tokens):
            raise RequestOptionError(name, tokens, f"{trouble}.")
