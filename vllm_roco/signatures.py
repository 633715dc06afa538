# SPDX-License-Identifier: Apache-2.0
"""Whether a function can be called, or overridden, as the plugin does it."""

from __future__ import annotations

import ast
import inspect
from inspect import Parameter, Signature
from types import FunctionType
from typing import Any


def call_trouble(call: ast.Call, target: Any) -> str | None:
    """Return why a function or class cannot be called as a call in the source does.

    Returns:
        None if it can, as far as can be told: arguments may be unpacked, and what is
        compiled need not tell its parameters.
    """
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    positional = [item for item in call.args if not isinstance(item, ast.Starred)]
    named = {item.arg: None for item in call.keywords if item.arg is not None}
    unpacked = len(positional) + len(named) < len(call.args) + len(call.keywords)
    bind = signature.bind_partial if unpacked else signature.bind
    try:
        bind(*positional, **named)
    except TypeError as error:
        return f"it takes {_spell(signature)}: {error}"
    return None


def override_trouble(ours: Any, theirs: Any) -> str | None:
    """Return why a member of a class cannot stand in for one of its base class.

    Parameters must have the same names in the same places, since vLLM may pass them by
    either; only a method with `**` leaves that to its base class.
    """
    properties = isinstance(ours, property) + isinstance(theirs, property)
    if properties == 2:
        return None
    if properties or function_of(theirs) is None:
        return f"it is a {type(theirs).__name__} there, not a {type(ours).__name__}"
    mine, wanted = _signature(ours), _signature(theirs)
    if _takes(mine, wanted):
        return None
    return f"it takes {_spell(wanted)} there and {_spell(mine)} here"


def function_of(member: Any) -> FunctionType | None:
    """Return the function behind a member of a class, None if there is none."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, staticmethod | classmethod):
        member = member.__func__
    function = inspect.unwrap(member) if callable(member) else None
    return function if isinstance(function, FunctionType) else None


def _takes(mine: Signature, wanted: Signature) -> bool:
    """Return whether whatever is passed to one signature can be passed to the other."""
    own = list(mine.parameters.values())
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in own):
        return True
    for index, parameter in enumerate(wanted.parameters.values()):
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.KEYWORD_ONLY):
            match = mine.parameters.get(parameter.name)
        else:
            match = own[index] if index < len(own) else None
        if match is None or match.name != parameter.name:
            return False
        if match.kind is Parameter.KEYWORD_ONLY is not parameter.kind:
            return False
        if match.default is Parameter.empty is not parameter.default:
            return False
    return all(
        parameter.default is not Parameter.empty
        for parameter in own
        if parameter.name not in wanted.parameters
        and parameter.kind is not Parameter.VAR_POSITIONAL
    )


def _signature(member: Any) -> Signature:
    """Return a method's signature without `self` or `cls`."""
    signature = inspect.signature(function_of(member) or member)
    parameters = list(signature.parameters.values())
    return Signature(parameters[not isinstance(member, staticmethod) :])


def _spell(signature: Signature) -> str:
    """Write a signature without types."""
    return str(
        Signature(
            [
                parameter.replace(annotation=Parameter.empty)
                for parameter in signature.parameters.values()
            ]
        )
    )
