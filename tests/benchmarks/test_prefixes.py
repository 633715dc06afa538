# SPDX-License-Identifier: Apache-2.0
"""Requests that share prefixes: their text, their engines, their rows and table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from vllm.benchmarks import serve, throughput
from vllm.engine.arg_utils import EngineArgs

from benchmarks.markdown import UNMEASURED
from benchmarks.rows import read, write
from benchmarks.serving import prefix_client, prefixes
from benchmarks.serving.comparisons import prefix_comparisons
from benchmarks.serving.engines import MODELS
from benchmarks.serving.jobs import MACHINE, Session
from benchmarks.serving.pictures import PICTURES
from benchmarks.serving.prefix_workloads import (
    GENERATION_PROMPT,
    PREFIX_WORKLOADS,
    SIDES,
    PrefixWorkload,
    prefix_runs,
    text,
)
from benchmarks.serving.tables import tables
from benchmarks.serving.vllm_bench import parsed

TOKENIZER = str(MODELS)
FEW = PrefixWorkload(
    about="",
    num_requests=5,
    num_prefixes=2,
    num_turns=3,
    prefix_len=12,
    suffix_len=8,
    output_len=2,
)


def test_requests_take_prefixes_in_turn_and_share_nothing_else() -> None:
    first, turns = text(FEW, 1)
    assert [len(prefix) for prefix in first] == 5 * [12]
    assert first[0] == first[2] == first[4] != first[1] == first[3]
    suffixes = [tuple(suffix) for turn in turns for suffix in turn]
    assert {len(suffix) for suffix in suffixes} == {8}
    assert len(set(suffixes)) == len(suffixes) == 15


def test_messages_end_as_the_models_do() -> None:
    """Or no chunk of a conversation's prompt would end with a turn."""
    config = json.loads((MODELS / FEW.model / "config.json").read_text())
    end = config["eos_token_id"]
    first, turns = text(FEW, 1)
    assert {prefix[-1] for prefix in first} == {end}
    for suffix in (suffix for turn in turns for suffix in turn):
        assert [place for place, token in enumerate(suffix) if token == end] == [0, 3]
    first, turns = text(replace(FEW, num_turns=1), 1)
    assert not any(end in tokens for tokens in [*first, *turns[0]])


def test_text_is_told_by_its_seed() -> None:
    assert text(FEW, 1, 2) == text(FEW, 1, 2)
    assert text(FEW, 1)[0][0] not in (text(FEW, 1, 2)[0] + text(FEW, 2)[0])


def test_an_engine_has_room_for_the_last_turn() -> None:
    # the answers of two turns are read in the third
    assert FEW.requests.input_len == 12 + 3 * 8 + 2 * 2
    assert FEW.requests.output_len == 2
    assert replace(FEW, max_tokens=64, max_num_seqs=3).requests.columns == {
        **{"num_requests": 3, "input_len": FEW.requests.input_len, "output_len": 64},
    }


@pytest.mark.parametrize("name", PREFIX_WORKLOADS)
def test_vllm_understands_the_engines(name: str) -> None:
    workload = PREFIX_WORKLOADS[name]
    config = json.loads((MODELS / workload.model / "config.json").read_text())
    for run in prefix_runs([name]):
        command = [
            *run.engine.command([f"--tokenizer={TOKENIZER}"]),
            "--skip-tokenizer-init",
        ]
        engine_args = EngineArgs.from_cli_args(parsed(throughput, command))
        assert engine_args.enable_prefix_caching is (run.side != "roco-uncached")
        assert engine_args.kv_cache_memory_bytes == workload.kv_cache_bytes
        longest = workload.requests.input_len + workload.requests.output_len
        assert engine_args.max_model_len is not None
        assert longest <= engine_args.max_model_len
        assert engine_args.max_model_len <= config["max_position_embeddings"]


def test_workloads_share_an_engine() -> None:
    names = ["shared-4096", "documents", "prefix-repetition", "shared-16384", "chat"]
    runs = prefix_runs(names, rounds=2)
    jobs = prefixes.jobs(runs, TOKENIZER, [])
    served = [
        " ".join(dict.fromkeys(str(columns["workload"]) for columns, _ in job))
        for job in jobs
    ]
    together = "shared-4096 shared-16384 chat"
    own = ["documents", "prefix-repetition"]
    # chats are told where answers begin, or not
    pair, more = "shared-4096 shared-16384", ["shared-4096", *3 * ["chat"]]
    once = [together, *own, pair, *more, *own, pair, "chat", *own]
    assert sorted(served) == sorted(2 * once)
    # a drift meets every side alike
    numbers = [columns["round"] for job in jobs for columns, _ in job]
    assert numbers == sorted(numbers, key=str)


def test_every_row_has_a_key_of_its_own() -> None:
    runs = prefix_runs(list(PREFIX_WORKLOADS), budgets=[1024, 2048], rounds=2)
    keys = [[run.columns[name] for name in prefixes.TABLE.key] for run in runs]
    assert len(set(map(tuple, keys))) == len(keys)


def test_budgets_are_the_command_lines() -> None:
    runs = prefix_runs(["chat"], budgets=[512, 4096])
    budgets = [(run.side, run.columns["budget"]) for run in runs]
    assert budgets == [
        *(("stock", None), ("roco", 512), ("roco", 4096), ("roco-uncached", 512)),
    ]
    told = {run.engine.roco.answer_start_token_ids for run in runs if run.engine.roco}
    assert told == {GENERATION_PROMPT}


def rows(commit: str, **speeds: float) -> list[dict[str, object]]:
    """Return rows of two rounds, of which the second is slower by two tokens."""
    return [
        {
            **{"gpu": "a GPU", "vllm": "1.2.3", "commit": commit, "flags": ""},
            **{name: run.columns[name] for name in prefixes.TABLE.key},
            "output_tok_s": speeds[run.side] - 2 * (run.number - 1),
            **{"ttft_ms": 10, "ttft_p99_ms": 20, "preemptions": 0},
            "hit_rate": None if run.side == "roco-uncached" else 0.9,
        }
        for run in prefix_runs(["chat", "shared-4096"], list(speeds), rounds=2)
    ]


def test_report(tmp_path: Path) -> None:
    write(
        tmp_path / "prefixes.csv",
        [
            *rows("old", stock=101, roco=51),
            *rows("new", **{"stock": 101, "roco": 151, "roco-uncached": 26}),
        ],
    )
    found = prefix_comparisons(read(tmp_path / "prefixes.csv"))
    assert set(found["commit"]) == {"new"}
    assert found.groupby("work", sort=False)["engine"].apply(list).tolist() == [
        [
            *("FLASH_ATTN", "roco, budget 2048"),
            "roco, budget 2048, answers read again",
            "roco, budget 2048, longest hits",
            "roco, budget 2048, no prefix caching",
        ],
        ["FLASH_ATTN", "roco, budget 2048", "roco, budget 1024"],
        [
            *("FLASH_ATTN", "roco, budget 2048", "roco, budget 1024"),
            "roco, budget 2048, no prefix caching",
        ],
    ]
    assert PICTURES["shared_prefixes"].write(tmp_path, tmp_path / "picture.svg")
    picture = (tmp_path / "picture.svg").read_text()
    for label in ("chat", "shared-4096, read before", "1.50", "0.25", "budget 1024"):
        assert f">{label}" in picture or f"{label}<" in picture
    page = " ".join(tables(tmp_path)["prefixes"].split())
    assert "| chat | FLASH_ATTN | 100 | 1.000 | 10 | 20 | 90.0% | 0 | 2 |" in page
    assert "| roco, budget 2048 | 150 | 1.50 (1.50 to 1.51) |" in page
    assert "caching | 25 | 0.25 (0.24 to 0.26) | 10 | 20 | | 0 | 2 |" in page


@pytest.mark.parametrize("side", ["stock", "roco"])
def test_without_both_sides_there_is_no_table(tmp_path: Path, side: str) -> None:
    """As when a run is cut short."""
    write(tmp_path / "prefixes.csv", rows("new", **{side: 101}))
    assert tables(tmp_path)["prefixes"] == UNMEASURED


def test_rows_of_another_shield_say_so(tmp_path: Path) -> None:
    new = rows("new", stock=101, roco=151)
    older = [row | {"shield": "peak"} for row in new if row["backend"] == "ROCO"]
    write(tmp_path / "prefixes.csv", new + older)
    page = " ".join(tables(tmp_path)["prefixes"].split())
    for engine in (
        *("roco, budget 2048", "roco, budget 2048, shield: peak"),
        "roco, budget 2048, shield: peak, longest hits",
    ):
        assert f"| chat | {engine} | 150 | 1.50 (" in page
    assert PICTURES["shared_prefixes"].write(tmp_path, tmp_path / "picture.svg")
    picture = (tmp_path / "picture.svg").read_text()
    assert ">chat<" in picture
    assert ">chat, shield: peak<" in picture
    assert ">roco, budget 2048, longest hits<" in picture
    assert "2048, shield" not in picture


def test_the_client_asks_for_the_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = PREFIX_WORKLOADS["prefix-repetition"]
    asked = []

    def answered(arguments: object) -> dict[str, float]:
        asked.append(vars(arguments))
        return {"completed": workload.num_requests - 1}

    monkeypatch.setattr(serve, "main", answered)
    with pytest.raises(RuntimeError, match="127 of 128 requests were answered"):
        prefix_client.ask("http://there", workload, 3, TOKENIZER)
    (arguments,) = asked
    assert arguments["base_url"] == "http://there"
    assert arguments["prefix_repetition_num_prefixes"] == workload.num_prefixes
    assert arguments["prefix_repetition_prefix_len"] == workload.prefix_len
    assert arguments["prefix_repetition_suffix_len"] == workload.suffix_len
    assert arguments["prefix_repetition_output_len"] == workload.output_len


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("engine_processes")
@pytest.mark.timeout(900)
def test_both_sides_serve_turns_behind_prefixes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cold row comes second: what the warm one read must be forgotten by then."""
    runs = prefix_runs(
        ["prefix-smoke"], SIDES[:2], baseline="CPU_ATTN", gpu_memory_utilization=0.3
    )
    session = Session(tmp_path, dict.fromkeys(MACHINE, ""), time_limit=1e9)
    jobs = prefixes.jobs(runs, TOKENIZER, ["--enforce-eager"])
    assert session.run(prefixes.TABLE, jobs) == 0, capsys.readouterr().err
    found = read(tmp_path / "prefixes.csv")
    assert found["warm"].tolist() == ["yes", "no"] * 2
    # of 4 x (144 + 168) tokens 4 x 128, and of the second turn another 4 x 128; two of
    # the first turn's requests read the prefixes when nobody has before
    warm, cold = 1024 / 1248, 768 / 1248
    assert found["hit_rate"].tolist() == pytest.approx([warm, cold] * 2, abs=1e-4)
    assert (found["ttft_p99_ms"] >= found["ttft_ms"]).all()
