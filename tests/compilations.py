# SPDX-License-Identifier: Apache-2.0
"""Which variants of the plugin's kernels Triton compiles, with and without a GPU.

Without one Triton itself looks at the arguments of each launch, binds them and finds
out whether it has the variant. Only its compiler and the launch are left out.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver, jit
from triton.runtime.jit import JITFunction

from vllm_roco.ops.launch import Launcher

HOPPER = GPUTarget("cuda", 90, 32)

Compilations = list[tuple[str, str]]
"""Kernels' names and what Triton compiled them for, in the order of compilation."""


@dataclass(frozen=True, eq=False)
class ImaginedCompilation:
    """A variant of a kernel that Triton would compile for a Hopper GPU.

    Attributes:
        kernel: The kernel's name.
        source: The kernel, and what it is compiled for.
        options: How, as Triton has worked it out.
    """

    kernel: str
    source: ASTSource
    options: dict[str, Any]

    def compile(self) -> CompiledKernel:
        """Compile it after all, which takes no GPU."""
        return triton.compile(self.source, target=HOPPER, options=self.options)


@contextlib.contextmanager
def forgotten_kernels() -> Iterator[pytest.MonkeyPatch]:
    """Let this process be one that has launched none of the kernels here yet.

    Yields:
        What is undone at the end.
    """
    ours = ("vllm_roco.ops", "benchmarks.kernels")
    modules = [sys.modules[x] for x in sys.modules if x.startswith(ours)]
    found = {id(x): x for module in modules for x in vars(module).values()}
    with pytest.MonkeyPatch.context() as patch:
        for thing in found.values():
            if isinstance(thing, Launcher):
                patch.setattr(thing, "_variants", {})
            if isinstance(thing, JITFunction):
                caches = defaultdict(thing.create_binder)
                patch.setattr(thing, "device_caches", caches)
        yield patch


@contextlib.contextmanager
def watched_compilations() -> Iterator[Compilations]:
    """Record what Triton compiles for the GPU of this machine, of any package."""
    found: Compilations = []
    hook = knobs.runtime.jit_post_compile_hook

    def note(**compiled: Any) -> Any:
        kernel = compiled["fn"]
        names = ", ".join(kernel.jit_function.arg_names)
        found.append(
            (f"{kernel.module}.{kernel.name}", f"({names}) = {compiled['key']}")
        )
        return hook(**compiled) if hook is not None else None

    with pytest.MonkeyPatch.context() as patch:
        # made for hooks, but not of every package's arguments
        patch.setattr(jit, "serialize_specialization_data", lambda *_: None)
        patch.setattr(knobs.runtime, "jit_post_compile_hook", note)
        yield found


@contextlib.contextmanager
def imagined_compilations() -> Iterator[list[ImaginedCompilation]]:
    """Record what Triton would compile for a Hopper GPU, whatever the tensors lie on.

    Kernels that are launched do nothing.
    """
    found: list[ImaginedCompilation] = []

    def compile_(
        kernel: JITFunction[Any],
        key: str,
        signature: Any,
        device: int,
        constexprs: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> Any:
        source = ASTSource(kernel, signature, constexprs, attributes)
        how = dict(options.__dict__)
        found.append(ImaginedCompilation(kernel.__name__, source, how))
        cache, _, target, *_ = kernel.device_caches[device]
        cache[key] = _Variant()
        about = key, signature, target, device, constexprs, options, [attributes]
        kernel._call_hook(knobs.runtime.jit_post_compile_hook, *about, warmup)
        return cache[key]

    with forgotten_kernels() as patch:
        patch.setattr(driver, "_active", _Driver())
        patch.setattr(JITFunction, "_do_compile", compile_)
        yield found


class _Driver:
    """What Triton asks a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER


class _Variant:
    """What was compiled, as far as it is asked for before it is launched."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        return None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.run
