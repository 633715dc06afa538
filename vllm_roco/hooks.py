# SPDX-License-Identifier: Apache-2.0
"""Every place where the plugin leans on vLLM, derived from the plugin's own code.

    python -m vllm_roco.hooks     # lists them; the exit status is 1 if one is gone

vLLM promises none of these names. What is imported and called is read from the source
of this package, what is overridden from its classes. Attributes that are read are left
to mypy, which `python -m tools.check_vllm` runs as well; `UNSEEN` has the rest.
"""

from __future__ import annotations

import ast
import dis
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from typing_extensions import override

from vllm_roco.signatures import call_trouble, function_of, override_trouble

UNSEEN: Mapping[str, tuple[str, ...]] = {
    # set by our classes, for vLLM to read
    "vllm.v1.attention.backend.AttentionBackend": (
        "forward_includes_kv_cache_update",
        "supported_dtypes",
        "supported_kv_cache_dtypes",
    ),
    "vllm.v1.attention.backend.AttentionImpl": (
        "head_size",
        "kv_cache_dtype",
        "num_heads",
        "scale",
    ),
    "vllm.v1.attention.backend.AttentionMetadataBuilder": ("_cudagraph_support",),
    "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl": ("sliding_window",),
    "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager": (
        "enable_caching",
        "kv_cache_group_id",
        "max_admission_blocks_per_request",
        "supports_fine_grained_hash_lookup",
    ),
    "vllm.v1.core.sched.scheduler.Scheduler": ("prefill_capacity_bound",),
    # wrapped, and what that reads: see `attention.request_rows`
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner": (
        "_dummy_run",
        "add_requests",
        "req_states",
        "vllm_config",
    ),
    "vllm.v1.worker.gpu.model_runner": ("copy_kv_cache_blocks_inplace",),
    "vllm.v1.worker.gpu.states.RequestState": ("req_id_to_index",),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": (
        "_dummy_run",
        "_update_states",
        "input_batch",
        "vllm_config",
    ),
    "vllm.v1.worker.gpu_model_runner": ("copy_kv_cache_blocks_inplace",),
    "vllm.v1.worker.gpu_input_batch.InputBatch": ("req_ids",),
    # read by a name in a string, or of what has no type
    "vllm.distributed.device_communicators.cuda_communicator.CudaCommunicator": (
        "pynccl_comm",
    ),
    "vllm.distributed.device_communicators.pynccl.PyNcclCommunicator": (
        "all_gather",
        "disabled",
    ),
    "vllm.config.ParallelConfig": (
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ),
    "vllm.config.SchedulerConfig": ("max_num_scheduled_tokens",),
    "vllm.v1.engine.async_llm.AsyncLLM": ("vllm_config",),
    # wrapped
    "vllm.v1.engine.input_processor.InputProcessor": (
        "__init__",
        "process_inputs",
        "vllm_config",
    ),
    "vllm.v1.kv_cache_interface.SlidingWindowSpec": (
        "max_admission_blocks_per_request",
    ),
    # its module makes up what it lacks
    "vllm.envs": ("VLLM_PLUGINS", "VLLM_TARGET_DEVICE"),
}
"""Attributes of which neither mypy nor the source tells that they are vLLM's."""

UNDECLARED = {
    "do_kv_cache_update": "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl",
}
"""Methods of ours that vLLM calls though no base class of ours has them, each with a
class of vLLM's own that has it."""

PLATFORMS = {
    "vllm.platforms.cpu": "cpu",
    "vllm.v1.attention.backends.fa_utils": "cuda",
}
"""Modules of vLLM that are needed, or whole, on one kind of device only."""


@dataclass(frozen=True)
class Hook:
    """One name of vLLM that the plugin uses.

    Attributes:
        name: Its full dotted name.
        use: `"imported"`, `"called"`, `"overridden"` or `"expected"`.
        user: The module or class of the plugin.
        trouble: What is amiss with it in the installed release, None if nothing is.
    """

    name: str
    use: str
    user: str
    trouble: str | None = None

    @override
    def __str__(self) -> str:
        line = f"{self.name} is {self.use} by {self.user}"
        return f"{line}, but {self.trouble}" if self.trouble else line


def hooks() -> list[Hook]:
    """Look for every hook in the release of vLLM in this environment.

    Hooks of another platform than the current one are left out.
    """
    found: dict[tuple[str, str, str], Hook] = {}
    for hook in _all_hooks():
        # one user speaks for all, but whatever is amiss is told
        user = hook.user if hook.trouble else ""
        found.setdefault((hook.name, hook.use, user), hook)
    return [found[key] for key in sorted(found)]


def vllm_bases(cls: type) -> list[type]:
    """Return the classes of vLLM that a class derives from, the nearest first."""
    return [base for base in cls.__mro__ if base.__module__.split(".")[0] == "vllm"]


def vllm_classes(module: str) -> list[type]:
    """Return the classes that a module of the plugin derives from vLLM's."""
    members = vars(importlib.import_module(module)).values()
    return [
        member
        for member in members
        if isinstance(member, type)
        and member.__module__ == module
        and vllm_bases(member)
    ]


def users() -> dict[str, ast.Module]:
    """Return the source of every module of the plugin that imports vLLM, by name."""
    package = Path(__file__).parent
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(_imports(tree)):
            found[name.removesuffix(".__init__")] = tree
    return found


def assigned(cls: type) -> set[str]:
    """Return what the methods of a class assign to `self`, inherited ones not."""
    found = set()
    for function in filter(None, map(function_of, vars(cls).values())):
        owner = function.__code__.co_varnames[:1]
        for loaded, stored in pairwise(dis.get_instructions(function)):
            if stored.opname == "STORE_ATTR":
                # newer Pythons load the value and its owner at once
                names = loaded.argval
                if (names if isinstance(names, tuple) else (names,))[-1:] == owner:
                    found.add(stored.argval)
    return found


def _all_hooks() -> Iterator[Hook]:
    from vllm.platforms import current_platform

    # a build for a device that is not there has no platform
    device = current_platform.device_type or "cpu"
    elsewhere = {module for module, where in PLATFORMS.items() if where != device}
    for module, tree in users().items():
        used = {module for module, _, _ in _imports(tree)}
        yield from _imported(module, tree, elsewhere)
        if not used & elsewhere:
            yield from _overridden(module)
    for path, names in UNSEEN.items():
        if path.rpartition(".")[0] not in elsewhere:
            yield from _expected(path, names)


def _imports(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Yield vLLM's module, its name in there, and the name that it is given by us."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    yield alias.name, "", alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if node.module.split(".")[0] == "vllm":
                    yield node.module, alias.name, alias.asname or alias.name


def _imported(user: str, tree: ast.Module, elsewhere: set[str]) -> Iterator[Hook]:
    """Yield what a module imports, and the functions of these that it calls."""
    targets = {}
    for module, name, bound in _imports(tree):
        if module in elsewhere:
            continue
        label = f"{module}.{name}" if name else module
        target, trouble = _resolve(module, name)
        yield Hook(label, "imported", user, trouble)
        if trouble is None:
            targets[bound] = label, target
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            label, target = targets.get(node.func.id, ("", None))
            if target is not None:
                yield Hook(label, "called", user, call_trouble(node, target))


def _resolve(module: str, name: str) -> tuple[Any, str | None]:
    """Return what a name of a module stands for, or None and why that is not known."""
    try:
        owner = importlib.import_module(module)
    # whatever an import raises, the name cannot be used
    except Exception as error:
        return None, f"{module} cannot be imported ({error})"
    if not name or hasattr(owner, name):
        return getattr(owner, name) if name else owner, None
    try:
        return importlib.import_module(f"{module}.{name}"), None
    except ImportError:
        return None, f"{module} has no {name}"


def _overridden(module: str) -> Iterator[Hook]:
    """Yield the methods with which a module's classes override vLLM's."""
    try:
        classes = vllm_classes(module)
    except Exception as error:
        # a name that vLLM lacks is told of where it is imported
        if (getattr(error, "name", None) or "").split(".")[0] != "vllm":
            yield Hook(module, "imported", __name__, f"that fails: {error}")
        return
    for cls in classes:
        user = _path(cls)
        bases = vllm_bases(cls)
        for name, ours in vars(cls).items():
            function = function_of(ours)
            # dataclasses make methods of their own
            if function is None or function.__code__.co_filename == "<string>":
                continue
            marked = name in UNDECLARED or getattr(function, "__override__", False)
            owners = [b for b in [*bases, _stand_in(name)] if name in vars(b)]
            if owners:
                trouble = override_trouble(ours, vars(owners[0])[name])
                yield Hook(f"{_path(owners[0])}.{name}", "overridden", user, trouble)
            elif marked and not any(name in vars(base) for base in cls.__mro__[1:]):
                trouble = "there is no such method, so vLLM does not call ours"
                yield Hook(f"{_path(bases[0])}.{name}", "overridden", user, trouble)


def _stand_in(name: str) -> type:
    """Return the class that shows how vLLM calls a method, `object` if none does."""
    path = UNDECLARED.get(name, "builtins.object")
    cls, trouble = _resolve(*path.rsplit(".", 1))
    return object if trouble else cls


def _expected(path: str, names: tuple[str, ...]) -> Iterator[Hook]:
    """Yield what is expected of a class though no source shows it."""
    owner, trouble = _resolve(*path.rsplit(".", 1))
    for name in names:
        lost = trouble
        if trouble is None and not (hasattr(owner, name) or _has_instance(owner, name)):
            lost = "it is not there"
        yield Hook(f"{path}.{name}", "expected", __name__, lost)


def _has_instance(cls: type, name: str) -> bool:
    """Return whether instances of a class have an attribute that it has not itself."""
    return any(
        name in inspect.get_annotations(base) or name in assigned(base)
        for base in inspect.getmro(cls)
    )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def main() -> int:
    """List every hook; return the exit status."""
    found = hooks()
    sys.stdout.writelines(f"{hook}\n" for hook in found)
    return int(any(hook.trouble for hook in found))


if __name__ == "__main__":
    sys.exit(main())
