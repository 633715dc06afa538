# SPDX-License-Identifier: Apache-2.0
"""A release of vLLM, known from its Python source alone.

Resolves what a name of a module stands for by following imports, and the attributes of
a class by following its bases, as far as they lie in vLLM. What vLLM inherits from
other packages (torch, pydantic, enum) is not seen.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any

from vllm_roco.hook_check import INITIALISERS, Symbol, spell_signature

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """What a name stands for.

    Attributes:
        module: The module that defines it, or the module itself.
        node: Its node in that module's tree; None for a module.
    """

    module: str
    node: ast.AST | None = None

    def __str__(self) -> str:
        return getattr(self.node, "name", self.module)


class SourceRelease:
    """The release of vLLM whose `vllm` package lies at `package`."""

    def __init__(self, package: Traversable) -> None:
        self._package = package
        self._scopes: dict[str, dict[str, ast.AST] | None] = {}

    @functools.cached_property
    def version(self) -> str:
        """The release's version, as its `_version.py` states it."""
        for node in ast.walk(ast.parse((self._package / "_version.py").read_text())):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names = [name.id for name in node.targets if isinstance(name, ast.Name)]
                if "__version__" in names:
                    return str(node.value.value)
        return "unknown"

    def find(self, module: str, name: str) -> Symbol:
        """Return what a module's name stands for.

        Args:
            module: Dotted name of a module of vLLM.
            name: Dotted name within the module; empty for the module itself.

        Raises:
            LookupError: There is no such module or name.
        """
        if self._scope(module) is None:
            raise LookupError(f"there is no module {module}")
        found = Definition(module)
        is_method = False
        for part in filter(None, name.split(".")):
            inner = self._attribute(found, part)
            if inner is None:
                raise LookupError(f"{found} has no {part}")
            is_method = isinstance(found.node, ast.ClassDef)
            found = inner
        parameters = None
        if isinstance(found.node, FunctionNode):
            parameters = _parameters(found.node, is_method)
        return Symbol(parameters, frozenset(self._members(found)))

    def _attribute(self, owner: Definition, name: str) -> Definition | None:
        """Return what an attribute of a module or class stands for."""
        if owner.node is None:
            return self._global(owner.module, name)
        for module, node in self._classes(owner):
            attribute = _bindings(node.body).get(name)
            if attribute is not None:
                return Definition(module, attribute)
        return None

    def _members(self, owner: Definition) -> Iterator[str]:
        """Yield the attributes of a class and its instances, or of a module."""
        if owner.node is None:
            yield from self._scope(owner.module) or ()
        for _, node in self._classes(owner):
            scope = _bindings(node.body)
            yield from scope
            for initialiser in map(scope.get, INITIALISERS):
                if isinstance(initialiser, FunctionNode):
                    yield from _assigned_to_self(initialiser)

    def _classes(self, owner: Definition) -> Iterator[tuple[str, ast.ClassDef]]:
        """Yield a class and its bases, depth first, each with its module."""
        if not isinstance(owner.node, ast.ClassDef):
            return
        yield owner.module, owner.node
        for base in owner.node.bases:
            # a generic base is the class that it subscripts
            expression = base.value if isinstance(base, ast.Subscript) else base
            found: Definition | None = Definition(owner.module)
            for part in ast.unparse(expression).split("."):
                found = found and self._attribute(found, part)
            if found is not None:
                yield from self._classes(found)

    def _global(self, module: str, name: str) -> Definition | None:
        """Return what a global name of a module stands for, through imports."""
        node = (self._scope(module) or {}).get(name)
        if node is None:
            submodule = f"{module}.{name}"
            return None if self._scope(submodule) is None else Definition(submodule)
        if isinstance(node, ast.Import | ast.ImportFrom):
            (alias,) = (alias for alias in node.names if _bound_name(alias) == name)
            if isinstance(node, ast.ImportFrom):
                return self._global(self._source(module, node), alias.name)
            return Definition(alias.name if alias.asname else name)
        if isinstance(node, ast.Name) and node.id != name:
            return self._global(module, node.id)
        return Definition(module, node)

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        """Return the absolute name of the module that a statement imports from."""
        if not node.level:
            return node.module or ""
        package = module.split(".")
        up = node.level - self._path(module).is_dir()
        return ".".join(package[: len(package) - up] + [node.module or ""]).rstrip(".")

    def _path(self, module: str) -> Traversable:
        """Return where a package of vLLM would lie."""
        return self._package.joinpath(*module.split(".")[1:])

    def _scope(self, module: str) -> dict[str, ast.AST] | None:
        """Return what a module binds; None if vLLM has no such module."""
        if module not in self._scopes:
            self._scopes[module] = self._parse(module)
        return self._scopes[module]

    def _parse(self, module: str) -> dict[str, ast.AST] | None:
        if module.split(".")[0] != "vllm":
            return None
        *parents, last = module.split(".")
        for source in (
            self._path(module) / "__init__.py",
            self._path(".".join(parents)) / f"{last}.py",
        ):
            if source.is_file():
                return _parsed(source.read_text(encoding="utf-8"))
        return None


@functools.lru_cache(maxsize=512)
def _parsed(source: str) -> dict[str, ast.AST]:
    """Return what a module binds; most modules are the same in several releases."""
    return _bindings(ast.parse(source).body)


def _bound_name(alias: ast.alias) -> str:
    """Return the name that an import binds."""
    return alias.asname or alias.name.split(".")[0]


def _bindings(body: Iterable[ast.stmt]) -> dict[str, ast.AST]:
    """Return what statements bind, the branches of `if` and `try` included.

    Functions, classes and imports win over assignments: a placeholder is often assigned
    where an import is not wanted or fails.
    """
    found: dict[str, ast.AST] = {}
    assigned: dict[str, ast.AST] = {}
    for statement in _flatten(body):
        if isinstance(statement, FunctionNode | ast.ClassDef):
            found.setdefault(statement.name, statement)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                found.setdefault(_bound_name(alias), statement)
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        assigned.setdefault(name.id, statement.value)
        elif isinstance(statement, ast.AnnAssign) and isinstance(
            statement.target, ast.Name
        ):
            assigned.setdefault(statement.target.id, statement.value or statement)
    return assigned | found


def _flatten(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, with those of conditional blocks in their place."""
    for statement in body:
        if isinstance(statement, ast.If | ast.Try | ast.With):
            yield from _flatten(statement.body)
            yield from _flatten(getattr(statement, "orelse", ()))
            for handler in getattr(statement, "handlers", ()):
                yield from _flatten(handler.body)
        else:
            yield statement


def _assigned_to_self(initialiser: FunctionNode) -> Iterator[str]:
    """Yield the attributes that a method gives its instance."""
    self_name = initialiser.args.args[0].arg
    for node in ast.walk(initialiser):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == self_name
        ):
            yield node.attr


def _parameters(function: FunctionNode, is_method: bool) -> str:
    """Return a function's signature without `self` or `cls`."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    kinds = inspect.Parameter
    parameters: list[tuple[str, Any, bool]] = [
        (argument.arg, kinds.POSITIONAL_OR_KEYWORD, index >= first_default)
        for index, argument in enumerate(positional)
    ]
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    if is_method and "staticmethod" not in decorators:
        del parameters[0]
    if arguments.vararg:
        parameters.append((arguments.vararg.arg, kinds.VAR_POSITIONAL, False))
    parameters += [
        (argument.arg, kinds.KEYWORD_ONLY, default is not None)
        for argument, default in zip(
            arguments.kwonlyargs, arguments.kw_defaults, strict=True
        )
    ]
    if arguments.kwarg:
        parameters.append((arguments.kwarg.arg, kinds.VAR_KEYWORD, False))
    return spell_signature(parameters)
