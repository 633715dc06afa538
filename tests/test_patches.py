# SPDX-License-Identifier: Apache-2.0
"""The patches for vLLM apply without fuzz, do what they say, and refuse other text.

Patches of the installed release are applied and run, patches of other tested releases
applied and compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fresh_python import forking
from tests.patches.vllm_overlay import (
    apply_patch,
    make_overlay,
    run_probe,
    touched_files,
)
from tests.releases import release_path
from tools import check_vllm
from tools.releases import installed_release

PATCHES = Path(__file__).parents[1] / "patches"
DIFFS = sorted(PATCHES.glob("*/*.diff"))


INSTALLED = str(installed_release())


@pytest.fixture(autouse=True, scope="module")
def checks_are_forks() -> Iterator[None]:
    with forking(check_vllm):
        yield


def _package(version: str) -> Path:
    return release_path(version) / "vllm"


def _name(diff: Path) -> str:
    return f"{diff.parent.name}-{diff.name[:4]}"


@pytest.fixture
def patched(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Overlays of the installed release without and with the patch of that number."""
    diffs = sorted((PATCHES / INSTALLED).glob(f"{request.param}-*.diff"))
    if not diffs:
        pytest.skip(f"there is no patch {request.param} for vLLM {INSTALLED}")
    files = touched_files(diffs[0])
    before = make_overlay(_package(INSTALLED), files, tmp_path / "before")
    after = make_overlay(_package(INSTALLED), files, tmp_path / "after")
    result = apply_patch(diffs[0], after)
    assert result.returncode == 0, result.stdout
    return before, after


@pytest.mark.parametrize("diff", DIFFS, ids=_name)
def test_applies_at_the_very_place_and_compiles(diff: Path, tmp_path: Path) -> None:
    files = touched_files(diff)
    overlay = make_overlay(_package(diff.parent.name), files, tmp_path / "overlay")
    result = apply_patch(diff, overlay)
    assert result.returncode == 0, result.stdout
    assert "offset" not in result.stdout
    assert "fuzz" not in result.stdout
    for file in files:
        source = (overlay / file).read_text(encoding="utf-8")
        original = _package(diff.parent.name).parent / file
        assert source != original.read_text(encoding="utf-8")
        compile(source, str(file), "exec")


@pytest.mark.parametrize("diff", DIFFS, ids=_name)
def test_refuses_text_that_differs(diff: Path, tmp_path: Path) -> None:
    files = touched_files(diff)
    overlay = make_overlay(_package(diff.parent.name), files, tmp_path / "overlay")
    context = next(
        line[1:]
        for line in diff.read_text(encoding="utf-8").splitlines()
        if line.startswith(" ") and line.strip()
    )
    for file in files:
        copy = overlay / file
        text = copy.read_text(encoding="utf-8")
        copy.write_text(text.replace(context, f"{context}  # changed"))
    assert apply_patch(diff, overlay).returncode != 0


@pytest.mark.slow
def test_every_hook_is_there_with_all_patches(tmp_path: Path) -> None:
    """Patching vLLM must not take away what the unpatched plugin uses."""
    diffs = sorted((PATCHES / INSTALLED).glob("*.diff"))
    files = [file for diff in diffs for file in touched_files(diff)]
    overlay = make_overlay(_package(INSTALLED), files, tmp_path / "overlay")
    for diff in diffs:
        assert apply_patch(diff, overlay).returncode == 0
    assert check_vllm.check(overlay) == []


def test_ledger_lists_every_patch() -> None:
    ledger = (PATCHES / "README.md").read_text(encoding="utf-8")
    assert {diff.parent.name for diff in DIFFS} == {"0.32.0", "0.33.0"}
    for diff in DIFFS:
        assert f"`{diff.stem}`" in ledger


@pytest.mark.slow
@pytest.mark.parametrize("patched", ["0001"], indirect=True)
def test_cpu_platform_honours_a_registered_backend(patched: tuple[Path, Path]) -> None:
    before, after = (run_probe("select_on_cpu.py", overlay) for overlay in patched)
    stock = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
    assert before == {"unset": stock, "PROBE": stock, "PROBE, head size 33": stock}
    assert after["unset"] == stock
    assert after["PROBE"] == "__main__.ProbeBackend"
    assert "head_size not supported" in after["PROBE, head size 33"]


@pytest.mark.slow
@pytest.mark.parametrize("patched", ["0002"], indirect=True)
def test_registered_backend_reaches_a_process_without_plugins(
    patched: tuple[Path, Path],
) -> None:
    results = []
    for overlay in patched:
        pickles = run_probe("pickle_backend.py", overlay)
        results.append(run_probe("pickle_backend.py", overlay, pickles))
    before, after = results
    stock = {"FLASH_ATTN": "FLASH_ATTN", "CUSTOM": "CUSTOM"}
    assert before == stock | {
        "PROBE": "'probe.Backend' is not a valid AttentionBackendEnum",
        "registered again": "PROBE",
    }
    assert after == stock | {"PROBE": "PROBE", "registered again": "PROBE"}


@pytest.mark.slow
@pytest.mark.parametrize("patched", ["0003"], indirect=True)
def test_scheduler_asks_the_hook_for_waiting_and_running_requests(
    patched: tuple[Path, Path],
) -> None:
    before, after = (run_probe("schedule_chunks.py", overlay) for overlay in patched)
    assert before == [100, 0, 0]
    assert after == [48, 48, 4]
