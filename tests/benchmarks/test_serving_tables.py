# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures come from CSV files, each row beside its own baseline."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.kernels.tensor_descriptors import TABLE
from benchmarks.kernels.uneven_rows import TABLE as UNEVEN_ROWS
from benchmarks.markdown import UNMEASURED
from benchmarks.rows import RESULTS, read, write
from benchmarks.serving import prefill, serve_workloads
from benchmarks.serving.captions import caption
from benchmarks.serving.comparisons import comparisons
from benchmarks.serving.jobs import MACHINE
from benchmarks.serving.pictures import PICTURES
from benchmarks.serving.tables import tables, tensor_descriptors, uneven_rows
from benchmarks.serving.workloads import runs

Row = dict[str, object]


def served(name: str, commit: str, number: int = 1, **speeds: float) -> list[Row]:
    """Return rows of a round of a workload, with each variant's tokens a second."""
    return [
        {
            "gpu": "a GPU",
            "vllm": "1.2.3",
            "commit": commit,
            "flags": "",
            **run.columns,
            "round": number,
            "output_tok_s": speed,
            "ttft_ms": 10,
            "tpot_ms": 2,
            "max_running": 8,
            "preemptions": 0,
        }
        for variant, speed in speeds.items()
        for run in runs(name, variants=[variant])
    ]


def compared(folder: Path, rows: list[Row]) -> pd.DataFrame:
    """Write rows, read them and compare them."""
    write(folder / "serving.csv", rows)
    return comparisons(read(folder / "serving.csv"))


def test_a_row_counts_only_beside_a_baseline_of_its_own_commit(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        [
            *served("batch-1", "old", stock=100, roco=90),
            *served("batch-1", "new", roco=999),
        ],
    )
    assert found["engine"].tolist() == ["FLASH_ATTN", "roco"] * 2
    assert found["ratio"].tolist() == [1, 0.9] * 2


def test_the_newest_comparison_counts(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        [
            *served("no-pressure", "old", stock=100, roco=90),
            *served("no-pressure", "new", roco=50, stock=100),
            *served("no-pressure", "new", roco=98),
        ],
    )
    assert found["engine"].tolist() == ["FLASH_ATTN", "roco"]
    assert found["ratio"].tolist() == pytest.approx([1, 0.98])


def test_report(tmp_path: Path) -> None:
    rows = served("r-kv-stress", "abc", stock=100, recent=150, roco=148)
    rows += served("r-kv-stress", "abc", **{"stock-fp8": 120, "roco-fp8": 160})
    write(tmp_path / "serving.csv", rows)
    times = {"iterations": 5, "ttft_low_ms": 9, "ttft_high_ms": 31}
    write(
        tmp_path / "prefill.csv",
        [
            {
                **{column: "x" for column in MACHINE},
                **prefill.columns(run),
                **times,
                "ttft_ms": 10 * number * (3 if run.engine.roco else 2),
            }
            for number in (1, 2)
            for run in prefill.runs([512, 1024], number)
        ],
    )
    found = tables(tmp_path)
    shown = {name for name, text in found.items() if text != UNMEASURED}
    assert shown == {"r-kv-stress", "throughput", "prefill"}
    text = " ".join("".join(found.values()).split())
    assert "FLASH_ATTN, fp8 KV cache | 120 | 1.200 |" in text
    ratios = "100 (1.00) | 120 (1.20) | 150 (1.50) | 148 (1.48) | 160 (1.60)"
    assert f"| 50 % | {ratios} |" in text
    assert "| roco | 148 | 1.480 | 10 | 2.00 | 8 | 0 |" in text
    assert "| 1 x 16384 | roco | 2048 | 1024 | 45.0 (9.0 to 31.0) | 1.500 | 2 |" in text


def test_rows_of_another_shield_say_so(tmp_path: Path) -> None:
    """Rows of one table may be of different rules."""
    name, times = "r-kv-stress", {"iterations": 5, "ttft_low_ms": 9, "ttft_high_ms": 31}
    rows = served(name, "a", stock=100, recent=150, roco=148)
    older = served(name, "a", **{"roco": 149, "roco-fp8": 160})
    found = compared(tmp_path, rows + [row | {"shield": "peak"} for row in older])
    assert found["engine"].tolist()[:5] == [
        *("FLASH_ATTN", "roco, policy: recent", "roco", "roco, shield: peak"),
        "roco, shield: peak, fp8 KV cache",
    ]
    write(
        tmp_path / "prefill.csv",
        [
            {
                **{column: "x" for column in MACHINE},
                **(prefill.columns(run) | shield),
                **times,
                "ttft_ms": 10,
            }
            for run in prefill.runs([1024])
            for shield in ([{}, {"shield": "peak"}] if run.engine.roco else [{}])
        ],
    )
    text = " ".join(tables(tmp_path)["prefill"].split())
    for engine in ("roco", "roco, shield: peak"):
        assert f"| 1 x 16384 | {engine} | 2048 | 1024 | 10.0" in text


def test_ranks_that_choose_apart_are_a_side_of_their_own(tmp_path: Path) -> None:
    rows = served("70b-two-gpus", "a", stock=100, roco=160, **{"roco-apart": 150})
    found = compared(tmp_path, rows)
    assert found["engine"].tolist() == ["FLASH_ATTN", "roco", "roco, agree: false"]
    assert found["ratio"].tolist() == pytest.approx([1, 1.6, 1.5])


def test_pictures(tmp_path: Path) -> None:
    write(
        tmp_path / "serving.csv",
        served("r-kv-stress", "abc", stock=100, recent=150, roco=148)
        + served("crossover", "abc", stock=100, roco=150),
    )
    for name in ("throughput", "crossover"):
        assert PICTURES[name].write(tmp_path, tmp_path / f"{name}.svg")
    assert "roco, policy: recent" in (tmp_path / "throughput.svg").read_text()
    for name in ("prefill", "decode_ratio", "resident_tokens"):
        assert not PICTURES[name].write(tmp_path, tmp_path / f"{name}.svg")


def test_rounds_show_their_median_and_extremes_and_not_the_best(tmp_path: Path) -> None:
    rounds = {1: (100, 99), 2: (90, 108), 3: (100, 130)}
    rows = [
        row
        for number, (stock, roco) in rounds.items()
        for row in served("no-pressure", "a", number, stock=stock, roco=roco)
    ]
    # each ratio is a round's own; rounds that lack a side count for nothing
    rows += served("no-pressure", "a", 4, roco=1)
    rows += served("no-pressure", "a", 5, stock=1)
    write(tmp_path / "serving.csv", rows)
    text = " ".join(tables(tmp_path)["no-pressure"].split())
    assert "256 x (700 + 1024), 3 rounds, qwen2.5-7b" in text
    assert "FLASH_ATTN | 100 | 1.000 | 10 |" in text
    assert "roco | 108 | 1.20 (0.99 to 1.30) | 10 |" in text


@pytest.mark.parametrize("sides", [("stock",), ("roco",), ("stock", "roco")])
def test_without_a_round_of_both_sides_there_is_no_table(
    tmp_path: Path, sides: tuple[str, ...]
) -> None:
    """As when a run is cut short."""
    rows = [
        row
        for number, side in enumerate(sides, start=1)
        for row in served("no-pressure", "a", number, **{side: 100})
    ]
    write(tmp_path / "serving.csv", rows)
    assert tables(tmp_path)["no-pressure"] == UNMEASURED


def test_engines_of_fewer_rounds_say_so(tmp_path: Path) -> None:
    rows = served("no-pressure", "a", 1, stock=100, recent=110, roco=120)
    rows += served("no-pressure", "a", 2, stock=100, roco=140)
    write(tmp_path / "serving.csv", rows)
    text = " ".join(tables(tmp_path)["no-pressure"].split())
    assert "roco, policy: recent | 110 | 1.100 | 10 | 2.00 | 8 | 0 | 1 |" in text
    assert "roco | 130 | 1.30 (1.20 to 1.40) | 10 | 2.00 | 8 | 0 | 2 |" in text


def test_an_engine_is_started_anew_for_each_round() -> None:
    names = [(run.number, run.engine.backend) for run in runs("smoke", rounds=2)]
    assert names == [
        (number, backend)
        for number in (1, 2)
        for backend in ("FLASH_ATTN", "FLASH_ATTN", "ROCO", "ROCO")
    ]
    assert len(serve_workloads.jobs(runs("smoke", rounds=2), [])) == 4
    assert (
        len(serve_workloads.jobs(runs("smoke", variants=["roco"], rounds=2), [])) == 2
    )


def test_what_rows_share_is_told_once() -> None:
    found = pd.DataFrame(
        {
            **{"gpu": "a GPU", "vllm": "1.2.3", "commit": ["a", "b", "a"]},
            "flags": ["--x '{\"y\":0}'", "--x '{\"y\": 0}'", "--x '{\"y\":0}'"],
        }
    )
    one, other = "a GPU, vLLM 1.2.3, commit a", "a GPU, vLLM 1.2.3, commit b"
    flags = "`--x '{\"y\":0}'`"
    assert caption(found) == f"{one}; {other}; all with {flags}:"
    assert caption(found.head(1)) == f"{one}, {flags}:"
    differ = found.assign(flags=["", "--z", ""])
    assert caption(differ) == f"{one}; {other}, `--z`:"


def test_requests_that_all_rows_share_need_no_column(tmp_path: Path) -> None:
    rows = served("no-pressure", "a", stock=1, roco=1)
    write(tmp_path / "serving.csv", rows + served("crossover", "a", stock=1, roco=1))
    found = tables(tmp_path)
    assert "requests" not in found["no-pressure"]
    assert "requests" in found["crossover"]


def test_a_step_is_attention_evicting_and_the_rest(tmp_path: Path) -> None:
    kernels = {"attend_kernel": ("yes", 60.0), "_score_kernel": ("yes", 5.0)}
    kernels |= {"void flash::FlashAttnFwdCombine": ("no", 2.0), "gemm": ("no", 30.0)}
    setting = {column: "x" for column in MACHINE}
    times = {"step_us": 100.0, "idle_us": 3.0, "scheduler_us": 9.0}
    write(
        tmp_path / "profile.csv",
        [
            {
                **setting,
                **{"model": "m", "variant": "roco", "step": "decode", **times},
                **{"kernel": kernel, "ours": ours, "us": us},
            }
            for kernel, (ours, us) in kernels.items()
        ],
    )
    text = " ".join(tables(tmp_path)["profile"].split())
    assert "| roco, decode | 100 | 62 | 5 | 30 | 3 | 9 |" in text


def test_kernels_by_tma_show_their_best_setting_with_statistics(tmp_path: Path) -> None:
    """What runs in both turns, and older code, is not shown twice."""
    columns = ["commit", *TABLE.key[8:], "us", "ratio"]
    told: list[tuple[object, ...]] = [
        ("old", 64, "tma", 64, "yes", 2, 4, 10, 9),
        ("new", 64, "flash", 32, "no", None, None, 100, 1),
        ("new", 64, "roco", 64, "yes", None, None, 125, 0.8),
        ("new", 64, "roco", 16, "yes", None, None, 110, 0.909),
        ("new", 64, "tma", 64, "yes", 2, 4, 104, 0.962),
        ("new", 64, "tma", 64, "yes", 3, 8, 103, 0.971),
        ("new", 64, "tma", 64, "no", 4, 4, 90, 1.111),
        ("new", 128, "flash", 32, "no", None, None, 99, 1),
        ("new", 128, "roco", 16, "yes", None, None, 109, 0.908),
        ("new", 128, "roco", 128, "yes", None, None, 105, 0.943),
    ]
    shape = {"batch": 8, "context": 2048, "q_heads": 4, "kv_heads": 2, "head_size": 64}
    for values in told:
        row = dict(zip(columns, values, strict=True))
        TABLE.append(tmp_path, {"gpu": "a GPU", "vllm": "1.2.3", **shape, **row})
    heading, line = tensor_descriptors(TABLE.read(tmp_path)).splitlines()[2::2]
    assert [each.strip() for each in heading.strip("|").split("|")] == [
        *("sequences x tokens", "heads", "FlashAttention 3"),
        *("roco, blocks of 16", "roco, blocks of 64", "roco, blocks of 128"),
        "by TMA, blocks of 64",
    ]
    assert [each.strip() for each in line.strip("|").split("|")] == [
        *("8 x 2048", "4/2/64", "100 (1.000)"),
        *("110 (0.909)", "125 (0.800)", "105 (0.943)"),
        "103 (0.971), 3 stages, 8 warps",
    ]


def test_the_rows_by_tma_have_the_columns_of_the_benchmark() -> None:
    assert not TABLE.read(RESULTS).empty


def test_rows_of_different_lengths_have_a_line_for_each_kind(tmp_path: Path) -> None:
    columns = ["commit", *UNEVEN_ROWS.key[3:], *UNEVEN_ROWS.results]
    told = [
        ("old", 16, 200, 3200, 28, 4, 128, 10, 20, 0.5),
        ("new", 48, 2048, 2303, 28, 4, 128, 30, 31, 0.968),
        ("new", 16, 200, 3200, 28, 4, 128, 10, 8, 1.25),
        ("new", 16, 2048, 2303, 28, 4, 128, 10, 10, 1.0),
    ]
    for values in told:
        row = dict(zip(columns, values, strict=True))
        UNEVEN_ROWS.append(tmp_path, {"gpu": "a GPU", "vllm": "1.2.3", **row})
    text = uneven_rows(UNEVEN_ROWS.read(tmp_path))
    assert text.startswith("a GPU, vLLM 1.2.3, commit new:")
    heading, *lines = [
        [each.strip() for each in line.strip("|").split("|")]
        for line in text.splitlines()[2:]
    ]
    assert heading == ["tokens of a row", "heads", "16 rows", "48 rows"]
    assert lines[1:] == [
        ["200 to 3,200", "28/4/128", "1.25", ""],
        ["2,048 to 2,303", "28/4/128", "1.00", "0.97"],
    ]
