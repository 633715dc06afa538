# SPDX-License-Identifier: Apache-2.0
"""The list of hooks is complete, and both ways of checking it find what is amiss."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from vllm.platforms import current_platform

import vllm_roco
from tests.patches.vllm_overlay import make_overlay
from tools import check_vllm
from tools.vllm_source import SourceRelease
from vllm_roco.compat import TESTED_VLLM, InstalledRelease, missing_hooks
from vllm_roco.hook_check import Hook, complaints
from vllm_roco.hooks import HOOKS

PACKAGE = Path(vllm_roco.__file__).parent
MODULES = sorted(
    module.name for module in pkgutil.walk_packages([str(PACKAGE)], "vllm_roco.")
)
LABELS = {hook.label for hook in HOOKS}


def _installed_package() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


VLLM = _installed_package()


def _label(hook: Hook) -> str:
    return hook.label


def test_installed_release_has_every_hook() -> None:
    assert missing_hooks() == []


def test_every_hook_is_listed_once() -> None:
    assert len(LABELS) == len(HOOKS)


def test_page_shows_the_list_for_every_tested_release() -> None:
    page = PACKAGE.with_name("docs") / "compatibility-hooks.md"
    _, _, table = page.read_text(encoding="utf-8").partition("## The hooks\n")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == ["hook", "needed to", *TESTED_VLLM]
    passed = ["PASS"] * len(TESTED_VLLM)
    assert rows[2:] == [
        [f"`{hook.label.removeprefix('vllm.')}`", hook.why, *passed] for hook in HOOKS
    ]


@pytest.mark.parametrize("hook", HOOKS, ids=_label)
def test_source_agrees_with_import(hook: Hook) -> None:
    source = SourceRelease(VLLM)
    assert list(complaints(hook, source)) == []
    if hook.platform not in (None, current_platform.device_type):
        pytest.skip(f"this platform is not {hook.platform}")
    read = source.find(hook.module, hook.name)
    imported = InstalledRelease().find(hook.module, hook.name)
    assert read.parameters == imported.parameters
    assert {*hook.members} <= read.members & imported.members


MANAGER = "v1/core/single_type_kv_cache_manager.py"
DAMAGE = [
    pytest.param(
        "v1/attention/backends/registry.py",
        "    class_path: str | None = None,\n    is_mamba",
        "    path: str | None = None,\n    is_mamba",
        ["registry.register_backend takes (backend, path=, is_mamba=), without class"],
        id="renamed argument of a call",
    ),
    pytest.param(
        "v1/attention/backends/registry.py",
        "    class_path: str | None = None,\n    is_mamba",
        "    class_path: str | None,\n    owner: str,\n    is_mamba",
        ["registry.register_backend takes", "now needs owner"],
        id="new argument that a call lacks",
    ),
    pytest.param(
        MANAGER,
        "        processed_computed_tokens: int,\n        num_prompt",
        "        processed_tokens: int,\n        num_prompt",
        ["FullAttentionManager.remove_skipped_blocks takes (request_id, processed_tok"],
        id="renamed parameter of a method that is overridden",
    ),
    pytest.param(
        MANAGER,
        "    def pop_blocks_for_free(self, request_id: str)",
        "    def take_blocks(self, request_id: str)",
        ["FullAttentionManager.pop_blocks_for_free is missing"],
        id="removed method of a base class",
    ),
    pytest.param(
        MANAGER,
        "        self.req_to_blocks: defaultdict",
        "        self.blocks_of: defaultdict",
        ["FullAttentionManager has no req_to_blocks"],
        id="renamed attribute of an instance",
    ),
    pytest.param(
        "v1/kv_cache_interface.py",
        "    page_size_padded: int | None = None\n    num_head_slots",
        "    num_head_slots",
        ["AttentionSpec has no page_size_padded"],
        id="removed field of a dataclass",
    ),
    pytest.param(
        "config/model.py",
        "self.runner_type = self._get_runner_type(",
        "self.runner = self._get_runner_type(",
        ["ModelConfig has no runner_type"],
        id="renamed attribute set after construction",
    ),
    pytest.param(
        "config/__init__.py",
        "    get_current_vllm_config_or_none,\n",
        "",
        ["vllm.config.get_current_vllm_config_or_none is missing"],
        id="name that is no longer exported",
    ),
]


@pytest.mark.parametrize(("file", "old", "new", "expected"), DAMAGE)
def test_source_check_finds_what_changed(
    file: str, old: str, new: str, expected: list[str], tmp_path: Path
) -> None:
    path = PurePosixPath("vllm") / file
    overlay = make_overlay(VLLM, [path], tmp_path)
    text = (overlay / path).read_text(encoding="utf-8")
    assert old in text
    (overlay / path).write_text(text.replace(old, new), encoding="utf-8")
    _, failures = check_vllm.check([SourceRelease(overlay / "vllm")])
    (failure,) = failures
    for part in expected:
        assert part in failure


def test_source_check_finds_a_module_that_is_gone(tmp_path: Path) -> None:
    path = PurePosixPath("vllm/v1/request.py")
    overlay = make_overlay(VLLM, [path], tmp_path)
    (overlay / path).unlink()
    _, failures = check_vllm.check([SourceRelease(overlay / "vllm")])
    assert len(failures) == 2
    assert all("there is no module vllm.v1.request" in failure for failure in failures)


def test_import_check_finds_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler

    def hook(self: Any, request: Any, num_tokens: int) -> int:
        return num_tokens

    monkeypatch.setattr(Scheduler, "_reserve_prefill_lookahead", hook)
    monkeypatch.delattr(VllmConfig, "max_concurrent_batches")
    monkeypatch.delattr("vllm.platforms.cpu_platform_plugin")
    gone, renamed, missing = missing_hooks()
    assert "vllm.config.VllmConfig has no max_concurrent_batches" in gone
    assert "takes (request, num_tokens), not (request, num_computed_tokens" in renamed
    assert "vllm.platforms has no cpu_platform_plugin" in missing


def test_command_passes_the_installed_release(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check_vllm.main([str(VLLM.parent)]) == 0
    table = capsys.readouterr().out
    assert table.count("PASS") == len(HOOKS)
    assert "FAIL" not in table


def test_command_reads_a_wheel_and_fails_on_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "vllm-9.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/_version.py", "__version__ = version = '9.0.0'\n")
        archive.write(VLLM / "v1/request.py", "vllm/v1/request.py")
    assert check_vllm.main([str(wheel)]) == 1
    printed = capsys.readouterr()
    assert re.search(r"hook +\| needed to +\| 9\.0\.0 +\|", printed.out)
    assert re.search(r"\| `v1\.request\.Request` .*\| PASS +\|", printed.out)
    assert printed.out.count("FAIL") == len(HOOKS) - 2
    assert "9.0.0: vllm.logger.init_logger is missing" in printed.err


def test_command_refuses_what_is_no_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "vllm.whl"):
        with pytest.raises(SystemExit, match="2"):
            check_vllm.main([str(path)])
        assert str(path) in capsys.readouterr().err


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of everything of vLLM that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_every_import_is_listed(module: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    used = {name for name in _imports(tree) if name.split(".")[0] == "vllm"}
    classes = {hook.module + "." + hook.name.split(".")[0] for hook in HOOKS}
    assert used <= LABELS | classes


def _overrides(module: str) -> Iterator[tuple[type, str]]:
    """Yield each class of a module with what it puts in the place of vLLM's."""
    for _, cls in inspect.getmembers(importlib.import_module(module), inspect.isclass):
        if cls.__module__ != module:
            continue
        for name, value in vars(cls).items():
            code = getattr(inspect.unwrap(value), "__code__", None)
            is_written = code is not None and code.co_filename != "<string>"
            # what the interpreter, abc or dataclass adds is no override
            if name == "_abc_impl" or (name.startswith("__") and not is_written):
                continue
            if any(name in vars(base) for base in _vllm_bases(cls)):
                yield cls, name


def _vllm_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.split(".")[0] == "vllm"]


def _hooks_of(cls: type, name: str) -> list[Hook]:
    """Return the hooks that list an attribute of one of a class's bases in vLLM."""
    bases = [base.__name__ for base in _vllm_bases(cls)]
    return [
        hook
        for hook in HOOKS
        if hook.name in [f"{base}.{name}" for base in bases]
        or (hook.name in bases and name in hook.members)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_override_is_listed_and_takes_what_vllm_passes(module: str) -> None:
    pytest.importorskip(module, exc_type=ImportError)
    for cls, name in _overrides(module):
        hooks = _hooks_of(cls, name)
        assert hooks, f"{cls.__name__}.{name} overrides vLLM's and is not in HOOKS"
        ours = InstalledRelease().find(module, f"{cls.__name__}.{name}").parameters
        for hook in hooks:
            if hook.overrides is None or ours is None or "**" in ours:
                continue
            passed = hook.overrides.replace("=", "").split(", ")
            assert ours.replace("=", "").split(", ")[: len(passed)] == passed
