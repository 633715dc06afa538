# SPDX-License-Identifier: Apache-2.0
"""The pickling of the backend's name, also for processes that have loaded no plugin."""

from __future__ import annotations

import copy
import copyreg
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import vllm_roco
from tests.fresh_python import run_fresh
from vllm_roco import backend_name

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.fixture
def reducer() -> Iterator[None]:
    """Registers the backend, and puts back how the enum was pickled before."""
    # which registers it too, the first time: later tests need that
    vllm_roco.register()
    before = copyreg.dispatch_table.pop(AttentionBackendEnum, None)
    backend_name.pickle_backend_by_name()
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
        backend_name.pickle_backend_by_name()
        backend_name.pickle_backend_by_name()
        reduce = copyreg.dispatch_table[AttentionBackendEnum]
        vllm_roco.register()
        flash, roco = AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum["ROCO"]
        assert reduce(flash) == reduce_by_name(flash)
        assert reduce(roco) == (backend_name.restore_backend, ("ROCO",))
    finally:
        del copyreg.dispatch_table[AttentionBackendEnum]
        if before is not None:
            copyreg.dispatch_table[AttentionBackendEnum] = before
