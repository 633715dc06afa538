# SPDX-License-Identifier: Apache-2.0
"""Goodput: what is asked, of whom, at which rates, and what becomes of the rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from vllm.benchmarks import serve, throughput
from vllm.benchmarks.datasets.datasets import TimedTrace
from vllm.engine.arg_utils import EngineArgs

from benchmarks.rows import read, write
from benchmarks.serving import online, online_client
from benchmarks.serving.engines import MODELS, Engine
from benchmarks.serving.jobs import MACHINE, Session
from benchmarks.serving.online import Plan
from benchmarks.serving.online_client import READS, chunk_size, trace, warm_up
from benchmarks.serving.online_report import limits, newest
from benchmarks.serving.online_servers import Servers
from benchmarks.serving.online_shapes import (
    AT_ONCE,
    SHAPES,
    SIDES,
    Run,
    Shape,
    online_runs,
    side_by_side,
)
from benchmarks.serving.pictures import PICTURES
from benchmarks.serving.rate_search import next_rate
from benchmarks.serving.tables import tables
from benchmarks.serving.vllm_bench import parsed
from tools.packaged_models import SMOLLM2, find_model
from vllm_roco.config import RocoConfig

AGENT = replace(SHAPES["agent"], num_requests=40)


def searched(limit: float, first: float, precision: float) -> list[float]:
    """Return the rates that are asked of a server that keeps up to `limit`."""
    kept: dict[float, bool] = {}
    while rate := next_rate(kept, first, precision):
        assert rate not in kept
        kept[rate] = rate <= limit
    return list(kept)


@pytest.mark.parametrize("limit", [0.3, 0.9, 1.0, 1.04, 2.3, 7.7, 100.0])
def test_the_search_brackets_the_limit(limit: float) -> None:
    asked = searched(limit, 1, 1.1)
    highest = max(rate for rate in asked if rate <= limit)
    lowest = min(rate for rate in asked if rate > limit)
    # rates have three digits
    assert lowest / highest <= 1.1 * 1.01


def test_the_search_gives_up_and_costs_little() -> None:
    assert searched(0, 1, 1.1) == [1, 0.5, 0.25, 0.125]
    assert searched(1.3, 1.25, 1.25) == [1.25, 1.88, 1.53]


def test_a_rate_kept_above_one_that_is_not_counts_for_nothing() -> None:
    assert next_rate({1: True, 1.5: False, 2.25: True}, 1, 1.1) == 1.22


def test_the_rates_asked_before_are_not_asked_again(tmp_path: Path) -> None:
    (run,) = online_runs(["chat:ample"], ["stock"])
    session = Session(tmp_path, dict.fromkeys(MACHINE, ""), time_limit=1e9)
    assert [rate for rate, _ in swept(session, run, Plan(rates=(2, 3)))] == [2, 3]
    assert [rate for rate, _ in swept(session, run, Plan(rates=(3, 4)))] == [4]
    # 2, 3 and 4 are kept
    search = swept(session, run, Plan(precision=1.25))
    assert [rate for rate, _ in search] == [6, 9, 7.35]
    assert swept(session, run, Plan(precision=1.25)) == []


def test_what_fails_ends_its_sweep_only(tmp_path: Path) -> None:
    runs = online_runs(["chat:ample"], ["stock", "roco"])
    session = Session(tmp_path, dict.fromkeys(MACHINE, ""), time_limit=1e9)

    def fails(run: Run, rate: float) -> float:
        if run.side == "stock":
            raise RuntimeError("no answer")
        return 1.0

    for run in runs:
        swept(session, run, Plan(rates=(2, 3)), fails)
    found = read(tmp_path / "serving_online.csv")
    assert found["side"].tolist() == ["roco", "roco"]


def test_servers_that_live_together_are_asked_in_turns(tmp_path: Path) -> None:
    """A search that was cut short had told all of one side and nothing of others."""
    runs = side_by_side(online_runs(["chat:ample", "agent:ample"], ["stock", "roco"]))
    session = Session(tmp_path, dict.fromkeys(MACHINE, ""), time_limit=1e9)
    kept = {"stock": 40, "roco": 70}
    swept(
        session,
        runs,
        Plan(precision=2),
        lambda run, rate: float(rate < kept[run.side]),
        together=[run.engine for run in runs],
    )
    found = read(tmp_path / "serving_online.csv")
    chat = found[found["shape"] == "chat"]
    assert list(zip(chat["side"], chat["rate"], strict=True)) == [
        *(("stock", 30), ("roco", 30), ("stock", 45), ("roco", 45)),
        ("roco", 67.5),
        ("roco", 101),
    ]
    assert found["shape"].drop_duplicates().tolist() == ["chat", "agent"]


def test_requests_that_come_fast_are_more_of_them() -> None:
    """Sixty that all came within a second had never let a queue grow."""
    shape = SHAPES["agent"]
    assert shape.at(1).num_requests == shape.num_requests == 100
    assert shape.at(30).num_requests == 30 * shape.least_seconds == 600
    assert SHAPES["many-long-prompts"].at(AT_ONCE) == SHAPES["many-long-prompts"]
    asked = []

    def ask(url: str, shape: Shape, *_: object) -> dict[str, float]:
        asked.append(shape.num_requests)
        names = ("ttft", "tpot", "itl")
        times = {
            f"{of}_{time}_ms": 1
            for of in ("mean", "p50", "p90", "p99", "p100")
            for time in names
        }
        return {
            **{"duration": 25, "request_goodput": 23.4, "output_throughput": 1},
            **{"max_concurrent_requests": 1, **times},
        }

    class Stand:
        url = ""

        def metrics(self) -> dict[str, float]:
            return {}

    (run,) = online_runs(["agent:ample"], ["stock"])
    servers = Servers([], "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "ask", ask)
        patch.setattr(online, "cached_and_preempted", lambda *_: {})
        patch.setattr(Servers, "ready", lambda *_: Stand())
        row = online.measure(run, 30, servers)
    assert asked == [600]
    assert (row["num_asked"], row["good_share"]) == (600, 0.975)


def swept(
    session: Session,
    runs: Run | list[Run],
    plan: Plan,
    share: Callable[[Run, float], float] = lambda run, rate: float(rate < 7),
    together: Sequence[Engine] = (),
) -> list[tuple[float, float]]:
    """Sweep without a server; return what was asked, and the share that was kept."""
    asked = []

    def measured(run: Run, rate: float, servers: Servers) -> dict[str, object]:
        good = share(run, rate)
        asked.append((rate, good))
        return {"good_share": good}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "measure", measured)
        known = online.partial(session.known, online.TABLE)
        runs = runs if isinstance(runs, list) else [runs]
        jobs = online.jobs(runs, plan, Servers([], "", together), known)
        session.run(online.TABLE, jobs)
    return asked


def test_prompts_have_their_lengths_and_nineteen_of_twenty_their_prefix() -> None:
    requests = list(trace(AGENT, seed=1))
    firsts = [request["hash_ids"][0] for request in requests]  # type: ignore[index]
    assert len(requests) == 40
    assert {first for first in firsts if first < 4} == {0, 1, 2, 3}
    assert sum(first >= 4 for first in firsts) == 2
    owns = [request["hash_ids"][1] for request in requests]  # type: ignore[index]
    assert len(set(owns)) == 40
    assert requests == list(trace(AGENT, seed=1)) != list(trace(AGENT, seed=2))


def test_lengths_are_log_normal_about_their_mean() -> None:
    shape = replace(SHAPES["chat"], num_requests=4000)
    for column, mean in (("input_length", 500), ("output_length", 300)):
        found = [int(str(request[column])) for request in trace(shape, seed=3)]
        assert sum(found) / len(found) == pytest.approx(mean, rel=0.05)
        assert mean // 8 <= min(found) < mean / 2 < 2 * mean < max(found) <= 4 * mean
    lengths = [request["input_length"] for request in trace(AGENT, seed=3)]
    assert set(lengths) == {8192 + 500}


def test_the_warm_up_reads_each_prefix_as_often_as_it_takes() -> None:
    firsts = [request["hash_ids"][0] for request in warm_up(AGENT)]  # type: ignore[index]
    assert [firsts.count(prefix) for prefix in range(4)] == 4 * [READS]
    written = [int(str(request["output_length"])) for request in warm_up(AGENT)]
    assert max(written) <= 32


def test_vllm_reads_the_trace(tmp_path: Path) -> None:
    """Prompts of one prefix are equal up to its end and differ behind it."""

    class Tokenizer:
        all_special_ids: tuple[int, ...] = ()

        def get_vocab(self) -> dict[str, int]:
            return {str(number): number for number in range(1000)}

    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in trace(AGENT, seed=1)))
    command = [
        *("--dataset-name=timed_trace", f"--dataset-path={path}"),
        f"--timed-trace-chunk-hash-size={chunk_size(AGENT)}",
    ]
    dataset = TimedTrace(**vars(parsed(serve, command)))
    samples = dataset.sample(Tokenizer(), AGENT.num_requests)  # type: ignore[arg-type]
    prompts = [sample.prompt for sample in samples]
    assert {len(prompt) for prompt in prompts} == {8692}
    assert len({tuple(prompt[:8192]) for prompt in prompts}) == 4 + 2
    assert len({tuple(prompt[8192:]) for prompt in prompts}) == 40


def test_the_client_tells_vllm_rate_and_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def answered(arguments: object) -> dict[str, float]:
        asked.append(vars(arguments))
        return {"completed": 39}

    monkeypatch.setattr(serve, "main", answered)
    with pytest.raises(RuntimeError, match="39 of 40 requests were answered"):
        online_client.ask("http://there", AGENT, 2.5, 7, str(MODELS))
    (arguments,) = asked
    assert arguments["request_rate"] == 2.5
    assert arguments["self_timed"] is False
    assert arguments["burstiness"] == 1
    assert serve.parse_goodput(arguments["goodput"]) == {"ttft": 1500, "tpot": 40}


@pytest.mark.parametrize("name", SHAPES)
def test_vllm_understands_the_engines(name: str) -> None:
    model = json.loads((MODELS / SHAPES[name].model / "config.json").read_text())
    for run in online_runs([name], list(SIDES)):
        command = run.engine.command([f"--tokenizer={MODELS}"])
        engine_args = EngineArgs.from_cli_args(parsed(throughput, command))
        assert engine_args.enable_prefix_caching
        assert engine_args.kv_cache_memory_bytes == run.shape.memory[run.memory]
        assert engine_args.max_model_len is not None
        assert sum(run.shape.longest) <= engine_args.max_model_len
        assert engine_args.max_model_len <= model["max_position_embeddings"]
        config = RocoConfig.from_additional_config(engine_args.additional_config)
        config.check_block_size(16)
        if run.engine.roco is not None:
            assert config == run.engine.roco


def test_one_server_serves_every_shape_of_its_memory_and_budget() -> None:
    names = ["long-document:scarce", "chat:scarce", "agent:ample"]
    runs = online_runs(names, ["stock", "roco"], rounds=2)
    served = [(run.number, run.side, run.name) for run in runs]
    assert served[:6] == [
        *((1, "stock", "long-document"), (1, "stock", "chat")),
        *((1, "roco", "long-document"), (1, "roco", "chat")),
        *((1, "stock", "agent"), (1, "roco", "agent")),
    ]
    assert len({run.engine for run in runs}) == 4
    beside = [(run.side, run.name) for run in side_by_side(runs)][:4]
    assert beside == [
        *(("stock", "long-document"), ("roco", "long-document")),
        *(("stock", "chat"), ("roco", "chat")),
    ]


def test_every_row_has_a_key_of_its_own() -> None:
    names = [name for name, shape in SHAPES.items() if shape.rate != AT_ONCE]
    runs = online_runs(names, list(SIDES), rounds=2)
    keys = [
        [run.columns[name] for name in online.TABLE.key if name != "rate"]
        for run in runs
    ]
    assert len(set(map(tuple, keys))) == len(keys)


def test_counts_and_memory_of_the_command_line() -> None:
    runs = online_runs(
        ["chat:ample", "agent:scarce"],
        ["stock", "roco"],
        num_requests=[7, 8],
        other={"budget": 512},
        kv_cache_bytes={"roco": 2**30},
    )
    found = [
        (run.name, run.side, run.shape.num_requests, run.engine.kv_cache_bytes)
        for run in side_by_side(runs)
    ]
    assert found == [
        *(("chat", "stock", 7, 16 * 2**30), ("chat", "roco", 7, 2**30)),
        *(("agent", "stock", 8, 5 * 2**30), ("agent", "roco", 8, 2**30)),
    ]
    assert {run.columns["budget"] for run in runs} == {None, 512}


@pytest.mark.parametrize(
    ("name", "told"),
    [("talk", "no shape 'talk'"), ("many-long-prompts:scarce", "Use ample")],
)
def test_an_unknown_shape_or_memory(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        online_runs([name])


def measured(
    name: str, kept: dict[str, list[float]], rates: Sequence[float]
) -> list[dict[str, object]]:
    """Return rows of servers that keep a limit each, another one in each round."""
    rounds = len(next(iter(kept.values())))
    times = {
        column: 1000 + place
        for place, column in enumerate(online.TABLE.results)
        if column.endswith("_ms")
    }
    return [
        {
            **dict.fromkeys(MACHINE, "x"),
            **{name: run.columns.get(name) for name in online.TABLE.key},
            **times,
            "rate": rate,
            "good_share": 1.0 if rate <= kept[run.side][run.number - 1] else 0.5,
            "output_tok_s": 300 + run.number,
            "num_asked": 50,
            "preemptions": 0,
        }
        for run in online_runs([name], list(kept), rounds=rounds)
        for rate in rates
    ]


def test_report(tmp_path: Path) -> None:
    kept = {"stock": [1, 2, 4], "roco": [6, 4, 8]}
    rows = measured("long-document:scarce", kept, [1, 2, 4, 6, 8, 10])
    rows += measured("many-long-prompts", {"stock": [0], "roco": [0]}, [AT_ONCE])
    write(tmp_path / "serving_online.csv", rows)
    found = tables(tmp_path)
    page = " ".join(found["online"].split())
    assert "| FLASH_ATTN | 2 (1 to 4) | 4 | 1.00 |" in page
    assert "| roco, budget 2048 | 6 (4 to 8) | 8 | 3.00 |" in page
    assert "| long-document, 16384 + 256 | 5 GiB | 3,000 / 50 |" in page
    page = " ".join(found["many-long-prompts"].split())
    assert "| 32 x (16384 + 128) | 32 GiB | roco, budget 2048 | 1,005 (1,005 to" in page
    assert PICTURES["goodput"].write(tmp_path, tmp_path / "picture.svg")
    picture = (tmp_path / "picture.svg").read_text()
    assert "long-document, 5 GiB" in picture
    assert "many-long-prompts" not in picture


def test_rows_of_another_shield_say_so(tmp_path: Path) -> None:
    rows = measured("chat:ample", {"stock": [2], "roco": [2]}, [1, 2, 3])
    older = [row | {"shield": "peak"} for row in rows if row["side"] == "roco"]
    write(tmp_path / "serving_online.csv", rows + older)
    page = " ".join(tables(tmp_path)["online"].split())
    for engine in ("roco, budget 2048", "roco, budget 2048, shield: peak"):
        assert f"| {engine} | 2 (2 to 2) | 3 | 1.00 |" in page


def test_a_ratio_is_at_least_what_the_baseline_s_next_rate_leaves() -> None:
    rows = measured("chat:ample", {"stock": [2], "roco": [9]}, [1, 2, 4, 8])
    stock, roco = limits(newest(pd.DataFrame(rows))).to_dict("records")
    assert (stock["limit"], stock["missed"]) == (2, 4)
    assert roco["limit"] == 8 and math.isnan(roco["missed"])
    assert (roco["ratio"], roco["least_ratio"]) == (4, 2)


def test_an_engine_that_keeps_no_rate_has_none(tmp_path: Path) -> None:
    write(
        tmp_path / "serving_online.csv",
        measured("chat:ample", {"stock": [2], "roco": [0.5]}, [1, 2, 3]),
    )
    page = " ".join(tables(tmp_path)["online"].split())
    assert "| roco, budget 2048 | 0 (0 to 0) | 1 | 0.00 |" in page


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("engine_processes")
@pytest.mark.timeout(900)
def test_both_sides_are_asked_at_two_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = online_runs(
        ["online-smoke"],
        ["stock", "roco"],
        baseline="CPU_ATTN",
        gpu_memory_utilization=0.3,
    )
    session = Session(tmp_path, dict.fromkeys(MACHINE, ""), time_limit=1e9)
    tokenizer = str(find_model(SMOLLM2))
    with Servers(["--enforce-eager"], tokenizer) as servers:
        known = online.partial(session.known, online.TABLE)
        jobs = online.jobs(runs, Plan(rates=(4, AT_ONCE)), servers, known)
        assert session.run(online.TABLE, jobs) == 0, capsys.readouterr().err
    found = read(tmp_path / "serving_online.csv")
    assert found["side"].tolist() == ["stock"] * 2 + ["roco"] * 2
    assert found["rate"].tolist() == [4, AT_ONCE] * 2
    # a loaded machine keeps limits of a minute
    assert found["good_share"].tolist() == 4 * [1]
    assert (found["ttft_p50_ms"] <= found["ttft_p99_ms"]).all()
    assert (found["ttft_p99_ms"] <= found["ttft_max_ms"]).all()
    # six of eight begin with one of two prefixes that were read before, and most of
    # what they ask is the prefix
    assert (found["hit_rate"] > 0.25).all()
    prompts = [list(trace(run.shape, seed=0)) for run in runs]
    assert prompts[0] == prompts[1]
