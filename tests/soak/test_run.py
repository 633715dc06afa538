# SPDX-License-Identifier: Apache-2.0
"""What a soak says of engines that answer well, and of those that do not."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.soak import resources, verdicts
from tests.soak.bounds import ServerOptions, bound_of
from tests.soak.clients import DISTURBANCES, Answer, Choice
from tests.soak.mix import Limits, Planned, canaries
from tests.soak.rank_steps import Step, rank_file
from tests.soak.ranks import Ranks
from tests.soak.resources import OneProcess, Sample
from tests.soak.run import Plan, Report, Soak

SERVER = ServerOptions(*(128, 32, 64, 16, 32), block_size=16, steps_in_flight=1)
LIMITS = Limits(max_model_len=1024, vocabulary=49152, longest_kept_prompt=368)
PLAN = Plan(
    num_requests=200,
    num_canaries=6,
    seed=3,
    concurrency=16,
    time_limit=None,
    exact=True,
    server=SERVER,
)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look again at once whether an engine rests that is none."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda _: sleep(0))


class PerfectClient:
    """Answers as an engine should, and writes the audit's file."""

    def __init__(self, audit: Path) -> None:
        self._audit = audit
        self._num_answers = 0
        self.write([])

    def write(self, faults: list[str]) -> None:
        counts = {"steps": 1, "tokens": 1, "microseconds": 1, "poisoned blocks": 1}
        counts |= {"fewest free": 0, "most blocks": 1}
        counts["preemptions"] = self._num_answers
        report = {"requests": 0, "seen": 0, "looks": self._num_answers}
        report |= {"freed blocks": 1, "prefixes": {}, "counts": counts}
        self._audit.write_text(json.dumps(report | {"faults": faults}))

    async def send(self, planned: Planned) -> Answer:
        self._num_answers += 1
        answer = self.answer(planned)
        self.write([])
        return answer

    def answer(self, planned: Planned) -> Answer:
        if planned.leaves:
            return Answer(0)
        if planned.is_refused:
            return Answer(400)
        sampling = planned.sampling
        form = sampling.get("structured_outputs")
        most = sampling["max_tokens"]
        choice = Choice([*range(most)], "length", "xyz", [-1.0] * most)
        if form is not None:
            choice = Choice([7], "stop", "red" if "choice" in form else "f", [-1.0])
        number = None
        if "prompt_logprobs" in sampling:
            number = len(planned.prompt) - 1
        return Answer(200, [choice] * sampling.get("n", 1), "", number)

    async def disturb(self, how: str) -> None:
        """Nothing disturbs it."""


def soak(
    client: PerfectClient, path: Path, plan: Plan = PLAN, ranks: Ranks | None = None
) -> Report:
    one = Soak(client, plan, LIMITS, path, os.getpid(), lambda line: None, ranks)
    return asyncio.run(one.run())


def test_nothing_is_wrong_with_good_answers(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    report = soak(PerfectClient(path), path)
    assert report.faults == []
    assert report.sent == PLAN.num_requests
    assert report.canaries == Counter(compared=6, equal=6)
    assert report.disturbances.total() == 10
    assert report.disturbances.keys() == {*DISTURBANCES}
    assert "requests" in report.table()
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["num_faults"] == 0


def test_a_time_limit_ends_it_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    report = soak(PerfectClient(path), path, replace(PLAN, time_limit=1e-9))
    assert report.faults == [] and report.sent < PLAN.num_requests


def a_500(planned: Planned, answer: Answer) -> Answer:
    return Answer(500) if answer.status == 400 else answer


def one_token_less(planned: Planned, answer: Answer) -> Answer:
    choices = [
        Choice(each.tokens[1:], each.reason, each.text, each.logprobs)
        for each in answer.choices
    ]
    return replace(answer, choices=choices)


def another_canary(planned: Planned, answer: Answer) -> Answer:
    if planned.canary is None or planned.number < 0:
        return answer
    (choice,) = answer.choices
    return replace(answer, choices=[Choice([9, *choice.tokens[1:]], "length")])


def left_alone(planned: Planned, answer: Answer) -> Answer:
    return Answer(0)


@pytest.mark.parametrize(
    ("worse", "says"),
    [
        (a_500, "status 500 instead of 400"),
        (one_token_less, "tokens of"),
        (another_canary, "token 0 is 9, alone 0"),
        (left_alone, "the client was left alone"),
    ],
)
def test_bad_answers_are_told(
    worse: Callable[[Planned, Answer], Answer], says: str, tmp_path: Path
) -> None:
    class Client(PerfectClient):
        def answer(self, planned: Planned) -> Answer:
            return worse(planned, super().answer(planned))

    path = tmp_path / "audit.json"
    report = soak(Client(path), path)
    assert any(says in fault for fault in report.faults), report.faults


def test_with_16_bits_rounding_may_choose_which_blocks_are_kept(
    tmp_path: Path,
) -> None:
    """So no answer is as good as a tie alone from the first eviction on."""

    class Client(PerfectClient):
        def answer(self, planned: Planned) -> Answer:
            answer = super().answer(planned)
            if planned.canary is None:
                return answer
            (choice,) = answer.choices
            likeliest = [{token: -1.0} for token in choice.tokens]
            choice = replace(choice, candidates=likeliest)
            if planned.number >= 0:
                choice = replace(choice, tokens=[9, *choice.tokens[1:]])
            return replace(answer, choices=[choice])

    path = tmp_path / "audit.json"
    plan = replace(PLAN, exact=False, num_canaries=18)
    report = soak(Client(path), path, plan)
    evicting = 0
    for bird in canaries(plan.num_canaries, LIMITS, "crowd"):
        number = len(bird.prompt)
        bound = bound_of(SERVER, bird.options, number, bird.sampling["max_tokens"])
        evicting += number >= (bound.first_eviction or number + 1)
    assert 0 < evicting < plan.num_canaries
    assert report.canaries["other blocks kept"] == evicting
    assert report.num_faults == plan.num_canaries - evicting


def test_what_the_engine_says_is_told(tmp_path: Path) -> None:
    class Client(PerfectClient):
        def write(self, faults: list[str]) -> None:
            super().write(["look 1: a block is lost"])

    path = tmp_path / "audit.json"
    report = soak(Client(path), path)
    assert "in the engine: look 1: a block is lost" in report.faults


def test_what_ranks_did_is_told(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    for rank, tables in enumerate((1, 2)):
        line = json.dumps(asdict(Step(0, ["r1"], tables)))
        rank_file(path, rank).write_text(line + "\n")
    ranks = Ranks(path, tensor=1, pipeline=2, agree=True)
    report = soak(PerfectClient(path), path, ranks=ranks)
    assert report.faults == ["before: step 0, rank 1 has the tables 2, rank 0 1"]
    assert "rank 1  " in report.table()
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())["ranks"]
    assert [counts["steps"] for counts in saved] == [1, 1]


def samples(*mib: int, files: int = 50, processes: int = 3) -> list[Sample]:
    """Return a flat start, and what follows."""
    first = Sample(1000, 50, 3, 1000)
    return [first] + [Sample(each, files, processes, 2000) for each in mib]


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        (samples(1000, 1000, 1000), None),
        (samples(), None),
        # one of the last two caught something in passing
        (samples(1000, 2000, 1000), None),
        (samples(1000, 1200, 1300), "memory grew"),
        (samples(1000, 1000, files=60), "open files grew"),
        (samples(1000, processes=2), "3 processes became 2"),
        # not warm yet
        ([Sample(500, 50, 3, 100), *samples(1000, 1000)], None),
    ],
)
def test_growth_is_told(seen: list[Sample], says: str | None) -> None:
    faults = resources.faults_of(seen)
    assert len(faults) == (says is not None)
    assert says is None or says in faults[0]


@pytest.mark.parametrize(
    ("mib", "files", "says"),
    [
        (500, 30, None),
        # within what all together may grow by
        (600, 30, "VLLM::Worker_TP1 (12): memory grew from 500 to 600 MiB"),
        (500, 39, "VLLM::Worker_TP1 (12): open files grew from 30 to 39"),
    ],
)
def test_growth_of_one_process_is_told(mib: int, files: int, says: str | None) -> None:
    seen = []
    for grown in (False, True, True):
        front = OneProcess(10, "python", 3000, 30)
        rank = OneProcess(12, "VLLM::Worker_TP1", 500, 30)
        if grown:
            rank = replace(rank, mib=mib, files=files)
        sample = Sample(front.mib + rank.mib, 60, 2, 2000, (front, rank))
        # of all together only memory counts here
        seen.append(sample)
    assert resources.faults_of(seen) == ([] if says is None else [says])


def test_rounding_may_choose_between_ties() -> None:
    alone = Choice([1, 2, 3], "length", candidates=[{1: -0.1}, {2: -1.0, 5: -1.4}, {}])
    assert verdicts.differs_from_alone(alone, alone, exact=True) is None
    tied = Choice([1, 5, 9], "length")
    assert verdicts.differs_from_alone(tied, alone, exact=False) is None
    assert verdicts.differs_from_alone(tied, alone, exact=True) is not None
    for tokens in ([1, 9, 3], [1, 2]):
        other = Choice(tokens, "length")
        assert verdicts.differs_from_alone(other, alone, exact=False) is not None
    worse = Choice([1, 2], "length", candidates=[{1: -0.1, 4: -0.7}, {2: -1.0}])
    other = Choice([4, 2], "length")
    assert verdicts.differs_from_alone(other, worse, exact=False) is not None
