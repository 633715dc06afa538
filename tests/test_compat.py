# SPDX-License-Identifier: Apache-2.0
"""The start-up check of vLLM's version, and the pickling of the backend's name."""

from __future__ import annotations

import copy
import copyreg
import json
import logging
import logging.handlers
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from packaging.version import Version
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import vllm_roco
from tests.fresh_python import run_fresh
from vllm_roco import compat

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.fixture
def vllm_log() -> Iterator[list[logging.LogRecord]]:
    """What vLLM logs; its logger may or may not propagate to pytest's handler."""
    handler = logging.handlers.BufferingHandler(capacity=100)
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    yield handler.buffer
    logger.removeHandler(handler)


@pytest.mark.parametrize("version", ["0.26.0", "0.31.9", "0.32.0rc1", "0.32.0.dev7"])
def test_an_older_release_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(ImportError, match=rf"vLLM {version} .*0\.32\.0 or newer"):
        compat.check_version()


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.32.0+cpu", "0.33.0+cu129"])
def test_a_tested_release_is_silent(
    version: str, monkeypatch: pytest.MonkeyPatch, vllm_log: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    compat.check_version()
    assert vllm_log == []


@pytest.mark.parametrize("version", ["0.32.1", "0.33.0rc1", "0.33.1.dev5+gabc", "1.0"])
def test_an_untested_release_is_warned_of_once(
    version: str, monkeypatch: pytest.MonkeyPatch, vllm_log: list[logging.LogRecord]
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    compat.check_version()
    compat.check_version()
    (record,) = vllm_log
    message = record.getMessage()
    assert f"vLLM {Version(version)} was not tested" in message
    assert "0.32.0 and 0.33.0 were" in message
    assert "python -m vllm_roco.verify" in message


def test_a_source_tree_without_a_version_asks_its_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = compat.installed_version()
    assert installed is not None
    monkeypatch.setattr("vllm.__version__", "dev")
    asked = compat.installed_version()
    # on a CPU, the distribution's version may tell so: 0.32.0+cpu
    assert asked is not None and asked.base_version == installed.base_version


@pytest.fixture
def reducer() -> Iterator[None]:
    """Registers the backend, and puts back how the enum was pickled before."""
    # which registers it too, the first time: later tests need that
    vllm_roco.register()
    before = copyreg.dispatch_table.pop(AttentionBackendEnum, None)
    compat.pickle_backend_by_name()
    yield
    del copyreg.dispatch_table[AttentionBackendEnum]
    if before is not None:
        copyreg.dispatch_table[AttentionBackendEnum] = before


def _run(source: str, argument: Any = None) -> Any:
    """Run code in a process that has loaded no plugin; it prints its result as JSON."""
    process = run_fresh(source, json.dumps(argument))
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


PICKLE_STOCK_MEMBERS = """
import json, pickle, sys
from vllm.v1.attention.backends.registry import AttentionBackendEnum
assert "vllm_roco" not in sys.modules
print(json.dumps({
    member.name: [pickle.dumps(member, p).hex() for p in json.loads(sys.argv[1])]
    for member in AttentionBackendEnum
}))
"""

UNPICKLE = """
import json, pickle, sys
assert "vllm_roco" not in sys.modules
members = [pickle.loads(bytes.fromhex(text)) for text in json.loads(sys.argv[1])]
print(json.dumps([[member.name, member.get_path()] for member in members]))
"""


@pytest.mark.usefixtures("reducer")
def test_stock_members_pickle_to_the_same_bytes_as_without_the_plugin() -> None:
    stock = _run(PICKLE_STOCK_MEMBERS, list(PROTOCOLS))
    assert len(stock) > 10
    for name, pickles in stock.items():
        member = AttentionBackendEnum[name]
        assert [pickle.dumps(member, p).hex() for p in PROTOCOLS] == pickles


@pytest.mark.usefixtures("reducer")
def test_backend_unpickles_where_no_plugin_is_loaded() -> None:
    """A spawned engine failed on its arguments: `... is not a valid ...Enum`."""
    member = AttentionBackendEnum["ROCO"]
    pickles = [pickle.dumps(member, p).hex() for p in PROTOCOLS]
    expected = [["ROCO", vllm_roco.BACKEND_PATH]] * len(pickles)
    assert _run(UNPICKLE, pickles) == expected


@pytest.mark.usefixtures("reducer")
@pytest.mark.parametrize("name", ["ROCO", "FLASH_ATTN", "CUSTOM"])
def test_members_stay_the_same_objects(name: str) -> None:
    member = AttentionBackendEnum[name]
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.copy(member) is member
    assert copy.deepcopy({"backend": member})["backend"] is member


def test_another_plugins_reducer_keeps_its_members() -> None:
    vllm_roco.register()
    before = copyreg.dispatch_table.get(AttentionBackendEnum)

    def reduce_by_name(member: AttentionBackendEnum) -> Any:
        return getattr, (AttentionBackendEnum, member.name)

    try:
        copyreg.pickle(AttentionBackendEnum, reduce_by_name)
        compat.pickle_backend_by_name()
        compat.pickle_backend_by_name()
        reduce = copyreg.dispatch_table[AttentionBackendEnum]
        vllm_roco.register()
        flash, roco = AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum["ROCO"]
        assert reduce(flash) == reduce_by_name(flash)
        assert reduce(roco) == (compat.restore_backend, ("ROCO",))
    finally:
        del copyreg.dispatch_table[AttentionBackendEnum]
        if before is not None:
            copyreg.dispatch_table[AttentionBackendEnum] = before
