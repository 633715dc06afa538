# SPDX-License-Identifier: Apache-2.0
"""What the plugin needs of vLLM is derived whole, and what changed there is found."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tests.fresh_python import forking
from tests.patches.vllm_overlay import make_overlay
from tests.releases import release_path
from tools import check_vllm
from tools.releases import installed_release, other_releases
from vllm_roco import hooks
from vllm_roco.signatures import function_of, override_trouble

ROOT = Path(__file__).parents[1]
VLLM = release_path(str(installed_release())) / "vllm"


@pytest.fixture(autouse=True, scope="module")
def checks_are_forks() -> Iterator[None]:
    with forking(check_vllm):
        yield


def troubles() -> list[str]:
    return [str(hook) for hook in hooks.hooks() if hook.trouble]


def test_installed_release_has_every_hook() -> None:
    assert troubles() == []


@pytest.mark.parametrize("version", other_releases())
def test_other_tested_releases_have_every_hook(version: str) -> None:
    with check_vllm.open_release(release_path(version)) as release:
        assert check_vllm.missing_hooks(release) == []


MANAGER = "v1/core/single_type_kv_cache_manager.py"
BACKEND = "v1/attention/backend.py"
DAMAGE = {
    "renamed argument of a call": (
        "v1/engine/__init__.py",
        "    request_id: str\n    new_token_ids: list[int]\n",
        "    request_id: str\n    token_ids: list[int]\n",
        [
            'Unexpected keyword argument "new_token_ids" for "EngineCoreOutput"',
            "EngineCoreOutput is called by vllm_roco.*, but it takes",
        ],
    ),
    "new argument that a call lacks": (
        "v1/attention/backends/registry.py",
        "    class_path: str | None = None,\n    is_mamba",
        "    class_path: str | None,\n    owner: str,\n    is_mamba",
        [
            'Missing positional argument "owner" in call to "register_backend"',
            "register_backend is called by vllm_roco, but it takes .*'owner'",
        ],
    ),
    "renamed parameter of a method that is overridden": (
        MANAGER,
        "        processed_computed_tokens: int,\n        num_prompt",
        "        processed_tokens: int,\n        num_prompt",
        [r"remove_skipped_blocks is overridden by .*, but it takes \(request_id, proc"],
    ),
    "removed method of a base class": (
        MANAGER,
        "    def pop_blocks_for_free(self, request_id: str)",
        "    def take_blocks(self, request_id: str)",
        [
            'Method "pop_blocks_for_free" is marked as an override, but no base',
            "pop_blocks_for_free is overridden by .*, but there is no such method",
        ],
    ),
    "renamed attribute of an instance": (
        MANAGER,
        "        self.req_to_blocks: defaultdict",
        "        self.blocks_of: defaultdict",
        ['"RocoManager" has no attribute "req_to_blocks"'],
    ),
    "removed field of a dataclass": (
        "v1/kv_cache_interface.py",
        "    page_size_padded: int | None = None\n    num_head_slots",
        "    num_head_slots",
        ['has no attribute "page_size_padded"'],
    ),
    "renamed attribute set after construction": (
        "config/model.py",
        "self.runner_type = self._get_runner_type(",
        "self.runner = self._get_runner_type(",
        ['"ModelConfig" has no attribute "runner_type"'],
    ),
    "removed property": (
        "config/vllm.py",
        "    def max_concurrent_batches(self) -> int:",
        "    def most_batches(self) -> int:",
        ['"VllmConfig" has no attribute "max_concurrent_batches"'],
    ),
    "name that is no longer exported": (
        "config/__init__.py",
        "    get_current_vllm_config_or_none,\n",
        "",
        [
            'Module "vllm.config" has no attribute "get_current_vllm_config_or_none"',
            "config.get_current_vllm_config_or_none is imported by .* has no get_curr",
        ],
    ),
    "attribute that vLLM reads of ours": (
        BACKEND,
        "    supported_kv_cache_dtypes:",
        "    cache_dtypes:",
        ["AttentionBackend.supported_kv_cache_dtypes is expected by .* not there"],
    ),
    "attribute of an instance that has no type": (
        "v1/worker/gpu/states.py",
        "self.req_id_to_index: dict",
        "self.slot_of: dict",
        ["RequestState.req_id_to_index is expected by .* not there"],
    ),
    "attribute that is read by its name": (
        "config/parallel.py",
        "    prefill_context_parallel_size: int",
        "    context_parallel_size: int",
        ["ParallelConfig.prefill_context_parallel_size is expected by .* not there"],
    ),
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the check says of a release and a plugin with all damage at once."""
    folder = tmp_path_factory.mktemp("damaged")
    files = {PurePosixPath("vllm") / file for file, *_ in DAMAGE.values()}
    overlay = make_overlay(VLLM, sorted(files), folder / "release")
    for file, old, new, _ in DAMAGE.values():
        path = overlay / "vllm" / file
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
    root = folder / "root"
    shutil.copytree(ROOT / "vllm_roco", root / "vllm_roco")
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "vllm_roco" / "extra.py").write_text(EXTRA)
    return "\n".join(check_vllm.check(overlay, root))


EXTRA = """
from typing import Any
from typing_extensions import override
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.core.single_type_kv_cache_manager import NoSuchManager
from vllm.v1.no_such_module import Anything
class Unmarked(FullAttentionManager):
    def free(self, request_id: str) -> None: ...
class Mistaken(FullAttentionManager):
    @override
    def no_such_method(self) -> None: ...
    @override
    def free(self, request: str) -> None:
        self.no_such_attribute
"""
"""A module of the plugin with every mistake that its author may make."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_finds_what_changed(damage: str, complaints: str) -> None:
    *_, expected = DAMAGE[damage]
    for pattern in expected:
        assert re.search(pattern, complaints)


@pytest.mark.parametrize(
    "pattern",
    [
        'extra.py.* has no attribute "NoSuchManager"',
        "NoSuchManager is imported by vllm_roco.extra, but .* has no NoSuchManager",
        'extra.py.*module named "vllm.v1.no_such_module"',
        "no_such_module.Anything is imported by vllm_roco.extra, but .*be imported",
        'extra.py.*"free" is not using @override',
        'extra.py.*"no_such_method" is marked as an override, but no base',
        'extra.py.*"Mistaken" has no attribute "no_such_attribute"',
    ],
)
def test_check_finds_what_a_new_module_takes_for_granted(
    pattern: str, complaints: str
) -> None:
    assert re.search(pattern, complaints)


def test_import_check_finds_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    def hook(self: Any, request: Any, num_tokens: int) -> int:
        return num_tokens

    monkeypatch.setattr(Scheduler, "_reserve_prefill_lookahead", hook)
    monkeypatch.delattr(SingleTypeKVCacheManager, "pop_blocks_for_free")
    monkeypatch.delattr(AttentionBackend, "supported_dtypes")
    monkeypatch.delitem(AttentionBackend.__annotations__, "supported_dtypes")
    monkeypatch.delattr("vllm.platforms.cpu_platform_plugin")
    *missing, attribute, changed, method = troubles()
    assert missing == [
        f"vllm.platforms.cpu_platform_plugin is imported by vllm_roco.{module}, but "
        "vllm.platforms has no cpu_platform_plugin"
        for module in ("cpu_platform", "platform")
    ]
    assert "AttentionBackend.supported_dtypes is expected by" in attribute
    assert "it takes (request, num_tokens) there and (request, num_computed" in changed
    assert "pop_blocks_for_free is overridden by" in method
    assert "no such method" in method


def test_command_reads_a_wheel_and_fails_on_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "vllm-9.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "")
        archive.write(VLLM / "v1/request.py", "vllm/v1/request.py")
    assert check_vllm.main([str(wheel)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"9\.0\.0.*: \d\d+ complaints\n", printed)
    assert 'module named "vllm.logger"' in printed
    # there is no platform to ask either
    assert "vllm_roco.hooks failed" in printed


def test_command_refuses_what_is_no_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "vllm.whl"):
        with pytest.raises(SystemExit, match="2"):
            check_vllm.main([str(path)])
        assert str(path) in capsys.readouterr().err


def test_page_names_commands_that_run() -> None:
    page = (ROOT / "docs" / "compatibility-hooks.md").read_text(encoding="utf-8")
    modules = set(re.findall(r"python -m ([\w.]+)", page))
    assert {"tools.check_vllm", "vllm_roco.hooks", "vllm_roco.verify"} <= modules
    assert all(map(importlib.util.find_spec, modules))


def test_list_is_printed_and_tells_every_use(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert hooks.main() == 0
    printed = capsys.readouterr().out
    for line in (
        "registry.register_backend is called by vllm_roco\n",
        "Scheduler.add_request is overridden by vllm_roco.",
        "CPUAttentionBackendImpl.do_kv_cache_update is overridden by vllm_roco.",
        "vllm.envs.VLLM_PLUGINS is expected by vllm_roco.hooks\n",
    ):
        assert line in printed


def _our_classes() -> list[type]:
    found = []
    for module in hooks.users():
        try:
            found += hooks.vllm_classes(module)
        # only where there is a GPU
        except ImportError:
            continue
    return found


def test_what_vllm_reads_of_our_classes_is_listed() -> None:
    """No release is checked for an attribute that a class sets and no table lists."""
    for cls in _our_classes():
        for base in hooks.vllm_bases(cls):
            known = vars(base).keys() | inspect.get_annotations(base).keys()
            known |= hooks.assigned(base)
            known -= {name for name in known if function_of(vars(base).get(name))}
            listed = {
                name
                for path, names in hooks.UNSEEN.items()
                for name in names
                if path.endswith(tuple(f".{base.__name__}" for base in cls.__mro__))
            }
            ours = {
                name
                for own in cls.__mro__
                if own.__module__.startswith("vllm_roco.")
                for name in (*vars(own), *hooks.assigned(own))
                if not name.startswith("__") and name != "_abc_impl"
            }
            assert ours & known <= listed, (cls, base)


def test_what_is_listed_is_used() -> None:
    used = set()
    for name, tree in hooks.users().items():
        if name == hooks.__name__:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.Name | ast.FunctionDef):
                used.add(node.id if isinstance(node, ast.Name) else node.name)
            elif isinstance(node, ast.Constant):
                used.add(node.value)
    listed = {name for names in hooks.UNSEEN.values() for name in names}
    assert listed | hooks.UNDECLARED.keys() <= used


def test_methods_that_vllm_does_not_declare_are_ours() -> None:
    for name in hooks.UNDECLARED:
        owners = [cls for cls in _our_classes() if name in vars(cls)]
        assert owners
        for cls in owners:
            assert not any(name in vars(base) for base in hooks.vllm_bases(cls))


class Theirs:
    def method(self, request: str, tokens: int = 0, *, replay: bool) -> None: ...
    @staticmethod
    def fixed(spec: int) -> None: ...
    @property
    def size(self) -> int:
        return 1


class Same(Theirs):
    def method(
        self, request: str, tokens: int = 1, extra: int = 0, *, replay: bool
    ) -> None: ...
    @classmethod
    def fixed(cls, spec: int) -> None: ...  # type: ignore[override]
    @property
    def size(self) -> int:
        return 2


class Renamed(Theirs):
    def method(self, name: str, tokens: int = 0, *, replay: bool) -> None: ...
    def fixed(self, other: int) -> None: ...  # type: ignore[override]
    def size(self) -> int: ...  # type: ignore[override]


class Loose(Theirs):
    def method(self, request: str, **others: Any) -> None: ...


class Demanding(Theirs):
    def method(self, request: str, tokens: int, *, replay: bool) -> None: ...  # type: ignore[override]


class Greedy(Theirs):
    def method(  # type: ignore[override]
        self, request: str, tokens: int = 0, *, replay: bool, more: int
    ) -> None: ...


class Short(Theirs):
    def method(self, request: str, tokens: int = 0) -> None: ...  # type: ignore[override]


@pytest.mark.parametrize(
    ("cls", "refused"),
    [
        (Same, []),
        (Loose, []),
        (Renamed, ["method", "fixed", "size"]),
        (Demanding, ["method"]),
        (Greedy, ["method"]),
        (Short, ["method"]),
    ],
)
def test_overrides_are_compared(cls: type, refused: list[str]) -> None:
    assert refused == [
        name
        for name, ours in vars(cls).items()
        if not name.startswith("__") and override_trouble(ours, vars(Theirs)[name])
    ]
