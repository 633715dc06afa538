# SPDX-License-Identifier: Apache-2.0
"""The front page's first numbers follow from the rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.headline import headline
from benchmarks.markdown import UNMEASURED
from benchmarks.rows import RESULTS, matching, read, write

TABLES = ("serving.csv", "prefixes.csv", "serving_online.csv", "quality.csv")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name in (*TABLES, "provenance.json"):
        shutil.copy(RESULTS / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", TABLES)
def test_without_a_table_there_is_no_headline(results: Path, name: str) -> None:
    (results / name).unlink()
    assert headline(results) == UNMEASURED


def test_without_a_workload_there_is_no_headline(results: Path) -> None:
    served = read(results / "serving.csv")
    write(results / "serving.csv", served[served["workload"] != "long-generation"])
    assert headline(results) == UNMEASURED


def test_without_a_shape_there_is_no_headline(results: Path) -> None:
    asked = read(results / "serving_online.csv")
    write(results / "serving_online.csv", asked[asked["shape"] != "agent"])
    assert headline(results) == UNMEASURED


def test_the_newest_rows_count_beside_their_own_baseline(results: Path) -> None:
    served = read(results / "serving.csv")
    round_1 = matching(served, workload="no-pressure", round=1)
    again = round_1.assign(
        gpu="NVIDIA B200", commit="newer", output_tok_s=[200.0, 300.0]
    )
    write(results / "serving.csv", pd.concat([served, again]))
    ample = "1.50 times where memory is ample and nothing is evicted (B200)"
    assert ample in headline(results)
    assert ample not in headline(RESULTS)


def test_the_most_that_ran_is_the_most_of_any_round(results: Path) -> None:
    """It was the median of the rounds."""
    served = read(results / "serving.csv")
    work = {"workload": "r-kv-stress", "round": 1, "gpu_memory_utilization": 0.17}
    stock = matching(served, **work, backend="FLASH_ATTN", kv_cache_dtype="auto")
    served.loc[stock.index, "max_running"] = 199
    roco = matching(served, **work, policy="roco", kv_cache_dtype="auto")
    served.loc[roco.index, "max_running"] = 222
    write(results / "serving.csv", served)
    told = "RoCo runs all 222 requests at once, stock vLLM (FLASH_ATTN) at most 199,"
    assert told in headline(results)
