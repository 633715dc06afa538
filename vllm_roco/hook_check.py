# SPDX-License-Identifier: Apache-2.0
"""Compares what the plugin needs of vLLM with what a release has.

How a release is looked at is left to others: `vllm_roco.compat` imports the installed
one, `tools/vllm_source.py` reads the source of any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

INITIALISERS = ("__init__", "__post_init__")
"""Methods whose assignments to `self` count as attributes of a class's instances."""


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One name of vLLM and what the plugin needs of it.

    Attributes:
        module: Dotted name of the module that the plugin imports it from.
        name: Dotted name within the module, empty for the module itself.
        why: What the plugin does with it.
        calls: Names of the arguments that the plugin passes. The function must take
            them, and must need no other.
        overrides: The whole signature, as `spell_signature` writes it, where the plugin
            puts its own function in vLLM's place or vLLM calls one of the plugin's.
        members: Attributes, fields or methods that are read.
        platform: `"cpu"` or `"cuda"` where only that platform's part needs it.
    """

    module: str
    name: str
    why: str
    calls: tuple[str, ...] | None = None
    overrides: str | None = None
    members: tuple[str, ...] = ()
    platform: str | None = None

    @property
    def label(self) -> str:
        """The full dotted name."""
        return f"{self.module}.{self.name}" if self.name else self.module


@dataclass(frozen=True)
class Symbol:
    """What a release has under a name.

    Attributes:
        parameters: The signature of a function as `spell_signature` writes it; None if
            it is something else.
        members: The attributes of a class and of its instances, or of a module.
    """

    parameters: str | None
    members: frozenset[str]


class Release(Protocol):
    """A release of vLLM that can be asked what it has."""

    def find(self, module: str, name: str) -> Symbol:
        """Return what a module's name stands for; LookupError if there is nothing."""


def complaints(hook: Hook, release: Release) -> Iterator[str]:
    """Yield a sentence for everything that a release does not have as a hook needs."""
    try:
        symbol = release.find(hook.module, hook.name)
    except LookupError as error:
        yield f"{hook.label} is missing: {error.args[0]}. Needed to {hook.why}."
        return
    lost = [member for member in hook.members if member not in symbol.members]
    if lost:
        yield f"{hook.label} has no {', '.join(lost)}. Needed to {hook.why}."
    if hook.overrides is not None and hook.overrides != symbol.parameters:
        yield (
            f"{hook.label} takes ({symbol.parameters}), not ({hook.overrides}). "
            f"Overridden to {hook.why}."
        )
    if hook.calls is not None:
        yield from _call_complaints(hook, hook.calls, symbol.parameters)


def spell_signature(parameters: Iterable[tuple[str, Any, bool]]) -> str:
    """Write a signature without types and values, such as `a, b=, *, c, **rest`.

    Args:
        parameters: Name, `inspect.Parameter` kind and whether there is a default, of
            each parameter.
    """
    spelled: list[str] = []
    keyword_only = False
    for name, kind, has_default in parameters:
        if kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            spelled.append("*")
        if kind is inspect.Parameter.VAR_POSITIONAL:
            keyword_only = True
            name = f"*{name}"
        elif kind is inspect.Parameter.VAR_KEYWORD:
            name = f"**{name}"
        spelled.append(f"{name}=" if has_default else name)
    return ", ".join(spelled)


def _call_complaints(
    hook: Hook, passed: tuple[str, ...], parameters: str | None
) -> Iterator[str]:
    """Yield what speaks against calling a function with the given arguments."""
    if parameters is None:
        yield f"{hook.label} is not a function. Called to {hook.why}."
        return
    taken = [name for name in parameters.split(", ") if name and name != "*"]
    names = [name.removesuffix("=") for name in taken if not name.startswith("*")]
    swallows = any(name.startswith("**") for name in taken)
    unknown = [name for name in passed if name not in names and not swallows]
    needed = [
        name
        for name in taken
        if not name.startswith("*") and not name.endswith("=") and name not in passed
    ]
    if unknown:
        yield (
            f"{hook.label} takes ({parameters}), without {', '.join(unknown)}. "
            f"Called to {hook.why}."
        )
    if needed:
        yield (
            f"{hook.label} takes ({parameters}) and now needs {', '.join(needed)}. "
            f"Called to {hook.why}."
        )
