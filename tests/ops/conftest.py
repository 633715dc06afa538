# SPDX-License-Identifier: Apache-2.0
"""Kernels run natively on a GPU, else under Triton's interpreter.

Triton decides at import whether it interprets, for every kernel of the process. So on a
machine without GPU these tests run in a process of their own, which
`test_interpreted.py` starts with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_[!i]*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True, scope="session")
def language_patched_once() -> Iterator[None]:
    """Let the interpreter make its changes to Triton's language once a launch.

    It makes the same ones at each call of a function within, which takes a third of
    the time of these tests.
    """
    patch_language = interpreter._patch_lang
    patched: set[str] = set()

    def patch_once(function: FunctionType) -> Any:
        languages = _languages_of(function)
        if languages <= patched:
            return None
        is_launch = not patched
        patched.update(languages)
        scope = patch_language(function)
        if is_launch:
            scope.restore = functools.partial(_in_turn, scope.restore, patched.clear)
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield


@functools.cache
def _languages_of(function: FunctionType) -> frozenset[str]:
    values = function.__globals__.values()
    return frozenset(each.__name__ for each in values if each is tl or each is tl.core)


def _in_turn(*functions: Any) -> None:
    for function in functions:
        function()


@pytest.fixture(autouse=True, scope="session")
def types_made_once() -> Iterator[None]:
    """Let the interpreter keep what it finds out about tensors of a type and a shape.

    It finds the same out for each number that it computes, which takes a quarter of the
    time of these tests.
    """
    if not INTERPRETED:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonSemantic, "broadcast_impl_value", _of_one_shape())
        patch.setattr(interpreter, "_get_np_dtype", _once_a_name())
        patch.setattr(tl.block_type, "__init__", _once_a_block())
        patch.setattr(tl.tensor, "__init__", _once_a_shape())
        yield


@pytest.fixture(autouse=True, scope="session")
def overflows_that_nobody_hears_of() -> Iterator[None]:
    """Let the interpreter not look for overflows where it would not tell.

    It looks at every sum and product of integers, which takes a quarter of the time of
    these tests, and then asserts nothing unless it debugs.
    """
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        if not builder.options.debug:
            options = dataclasses.replace(builder.options, sanitize_overflow=False)
            patch.setattr(builder, "options", options)
        yield


def _of_one_shape() -> Callable[..., tuple[tl.tensor, tl.tensor]]:
    """Return what leaves alone, as the original does, what has one shape."""
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unless_equal(
        self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor
    ) -> tuple[tl.tensor, tl.tensor]:
        if _shape(lhs.type) == _shape(rhs.type):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return broadcast_unless_equal


def _once_a_name() -> Callable[[tl.dtype], Any]:
    find, found = interpreter._get_np_dtype, {}

    def np_dtype(kind: tl.dtype) -> Any:
        if kind.name not in found:
            found[kind.name] = find(kind)
        return found[kind.name]

    return np_dtype


def _once_a_block() -> Callable[[tl.block_type, tl.dtype, Any], None]:
    init, found = tl.block_type.__init__, {}

    def init_once(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        # pointers into several kinds of memory have one name
        if type(element_ty) is not tl.dtype:
            init(self, element_ty, shape)
            return
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in found:
            init(self, element_ty, shape)
            found[key] = dict(vars(self))
        vars(self).update(found[key])

    return init_once


def _once_a_shape() -> Callable[[tl.tensor, Any, tl.dtype], None]:
    init, found = tl.tensor.__init__, {}

    def init_once(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        key = _shape(type)
        if key not in found:
            init(self, handle, type)
            found[key] = {"shape": self.shape, "numel": self.numel}
        self.handle, self.type, self.dtype = handle, type, type.scalar
        vars(self).update(found[key])

    return init_once


def _shape(type: tl.dtype) -> tuple[int, ...]:
    return (*type.shape,) if type.is_block() else ()
