# SPDX-License-Identifier: Apache-2.0
"""What a run keeps: the method and its numbers, as they stand in a table's row."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_METHODS = ("roco", "recent")
TOKEN_METHODS = ("token-roco", "h2o", "tova", "sink-recent", "random")
METHODS = ("full", *BLOCK_METHODS, *TOKEN_METHODS)
SHIELDS = ("peak", "deviation", "rms", "focus", "none")


@dataclass(frozen=True)
class EvictionMethod:
    """One way to keep at most `budget` tokens of a sequence.

    Attributes:
        name: `full` keeps everything. The plugin's, one choice of blocks for all
            layers and heads: `roco`; `recent`, the first and the newest. Published, on
            tokens: `token-roco` (arXiv 2402.06262) and `h2o` (arXiv 2306.14048), a
            choice for every layer and kv head; `tova` (arXiv 2401.06104), one for every
            layer; `sink-recent` (arXiv 2309.17453); `random`, for every layer and kv
            head, with the first and the newest tokens spared.
        budget: Tokens kept; a multiple of `block_size` for `roco` and `recent`.
        stride: Tokens evicted at a time; the same.
        chunk: Prompt tokens read per step.
        block_size: Tokens per block, of `roco` and `recent`.
        shield: The statistic of `roco`'s first stage, one of `SHIELDS`.
        shield_ratio: Share of the budget that it shields.
        sink: First tokens that are never evicted, of `roco`, `recent`, `sink-recent`
            and `random`; the other methods bring their own.
        recent: Newest tokens that are never evicted, of the same.
        options: Fields of `rule.Rule` to set after all this, name and value.

    Raises:
        ValueError: A value is unknown or out of range.
    """

    name: str
    budget: int = 0
    stride: int = 128
    chunk: int = 256
    block_size: int = 16
    shield: str = "peak"
    shield_ratio: float = 0.7
    sink: int = 16
    recent: int = 32
    options: tuple[tuple[str, str | float], ...] = ()

    def __post_init__(self) -> None:
        _require(self.name in METHODS, "name", self.name, " or ".join(METHODS))
        _require(self.chunk > 0, "chunk", self.chunk, "1 or more")
        if self.name == "full":
            return
        _require(self.shield in SHIELDS, "shield", self.shield, " or ".join(SHIELDS))
        ratio = self.shield_ratio
        _require(0 <= ratio <= 1, "shield_ratio", ratio, "a number from 0 to 1")
        unit = self.block_size if self.name in BLOCK_METHODS else 1
        for name in ("budget", "stride"):
            value = getattr(self, name)
            allowed = f"a multiple of {unit}, above 0"
            _require(value > 0 and value % unit == 0, name, value, allowed)
        spared = sum(-(-tokens // unit) * unit for tokens in (self.sink, self.recent))
        allowed = f"at most budget = {self.budget}, in whole blocks"
        _require(spared <= self.budget, "sink + recent", spared, allowed)

    def evicted_tokens(self, num_computed_tokens: int) -> int:
        """Return how many tokens a sequence has given up at this length.

        Every method gives up as many at the same time: whenever the sequence has grown
        by `stride` past the budget, `stride` go.
        """
        if self.name == "full":
            return 0
        over = num_computed_tokens - self.budget
        return max(0, over // self.stride) * self.stride

    def most_live_tokens(self, num_tokens: int) -> int:
        """Return the most tokens attended in reading and writing `num_tokens`."""
        if self.name == "full":
            return num_tokens
        return min(num_tokens, self.budget + self.stride + self.chunk)


def _require(valid: bool, name: str, value: object, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name} = {value!r} is not allowed. Use {allowed}.")
