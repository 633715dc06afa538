# SPDX-License-Identifier: Apache-2.0
"""Sends a crowd of requests, looks at the engine between its tenths, and judges."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.soak import resources, verdicts
from tests.soak.bounds import ServerOptions, bound_of
from tests.soak.clients import (
    DISTURBANCES,
    TIE_CANDIDATES,
    Answer,
    Choice,
    Client,
)
from tests.soak.mix import Limits, Planned, canaries, crowd
from tests.soak.ranks import Ranks
from tests.soak.resources import Sample

_MOST_FAULTS = 20
_MANY = 200
"""Requests of a part of which some must be preempted."""
_REST = 60
"""Seconds in which an engine has to come to rest."""


@dataclass(frozen=True)
class Plan:
    """How much there is to do.

    Attributes:
        num_requests: Requests of the crowd.
        num_canaries: Requests of these whose answers are compared.
        seed: Of the crowd.
        concurrency: Requests on their way at once.
        time_limit: Seconds after which no more are sent, None for all.
        exact: Whether canaries must answer token for token as alone.
        server: What a request evicts by unless it says otherwise. Where not all is
            exact, rounding may choose other blocks from the first eviction on, and
            canaries are compared with themselves alone until then.
        num_parts: After how many parts the engine comes to rest.
    """

    num_requests: int
    num_canaries: int
    seed: int
    concurrency: int
    time_limit: float | None
    exact: bool
    server: ServerOptions
    num_parts: int = 10


@dataclass
class Report:
    """What a soak has seen.

    Attributes:
        sent: Requests of the crowd that were sent.
        seconds: That took, without the canaries alone.
        statuses: Answers by status, 0 for clients that went away.
        traits: Requests by what was special about them.
        tokens: Generated ones, of complete answers.
        disturbances: What was done to the engine in mid-traffic.
        canaries: Those compared, and those equal token for token.
        samples: The engine's processes after each part.
        audit: The last report of `tests.soak.audit`.
        ranks: What each of several ranks has done, in numbers.
        faults: What was wrong, empty if nothing was.
        num_faults: How often something was wrong.
    """

    sent: int = 0
    seconds: float = 0
    statuses: Counter[int] = field(default_factory=Counter)
    traits: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    disturbances: Counter[str] = field(default_factory=Counter)
    canaries: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    audit: dict[str, Any] = field(default_factory=dict)
    ranks: list[Counter[str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0

    def fault(self, what: str) -> None:
        """Note that something is wrong."""
        self.num_faults += 1
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(what)

    def save(self, path: Path) -> None:
        """Write all of it as JSON."""
        # not by `asdict`, which takes counters for other dictionaries
        values = vars(self) | {"samples": [asdict(each) for each in self.samples]}
        path.write_text(json.dumps(values, indent=1) + "\n")

    def table(self) -> str:
        """Return the end of a run's output."""
        counts, prefixes = self.audit["counts"], self.audit["prefixes"]
        rows = {
            "requests": f"{self.sent:,} in {self.seconds:.0f} s",
            "answers by status (0: client gone)": dict(sorted(self.statuses.items())),
            "generated tokens of complete answers": f"{self.tokens:,}",
            "steps, tokens in them": f"{counts['steps']:,}, {counts['tokens']:,}",
            "looks into the block tables": f"{self.audit['looks']:,}",
            "seconds of these": f"{counts['microseconds'] / 1e6:.1f}",
            "preemptions": f"{counts.get('preemptions', 0):,}",
            "blocks evicted": f"{self.audit['freed blocks']:,}",
            "blocks poisoned when free": f"{counts['poisoned blocks']:,}",
            "fewest blocks free": counts["fewest free"],
            "most blocks of a request": counts["most blocks"],
            "snapshots published, hits; block hits": (
                f"{prefixes.get('published_snapshots')}, "
                f"{prefixes.get('snapshot_hits')}; {prefixes.get('block_hits')}"
            ),
            "disturbances": dict(self.disturbances),
            "canaries": dict(self.canaries),
            "MiB after each part": [round(each.mib) for each in self.samples],
            "open files after each part": [each.files for each in self.samples],
            "faults": self.num_faults,
        }
        for rank, done in enumerate(self.ranks):
            rows[f"rank {rank}"] = dict(done)
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


class Soak:
    """One run.

    Args:
        client: The way to the engine.
        plan: How much there is to do.
        limits: What requests must fit.
        audit: The file of `tests.soak.audit`.
        root: The process of which the engine is a part, or which has started it.
        say: Takes lines of progress.
        ranks: Those of the engine, if there are several.
    """

    def __init__(
        self,
        client: Client,
        plan: Plan,
        limits: Limits,
        audit: Path,
        root: int,
        say: Callable[[str], None],
        ranks: Ranks | None = None,
    ) -> None:
        self._client, self._plan, self._limits = client, plan, limits
        self._audit, self._root, self._say = audit, root, say
        self._ranks = ranks
        self._alone: dict[int, Choice] = {}
        self.report = Report()

    async def run(self) -> Report:
        """Send everything and return what was seen."""
        plan, report = self._plan, self.report
        for bird in canaries(plan.num_canaries, self._limits, "alone"):
            answer = await self._client.send(self._asked(bird))
            for fault in verdicts.faults_of(bird, answer):
                report.fault(f"canary {bird.canary} alone: {fault}")
            if answer.choices and bird.canary is not None:
                self._alone[bird.canary] = answer.choices[0]
        await self._rest("before")
        started = time.monotonic()
        deadline = started + (plan.time_limit or float("inf"))
        planned = [
            *crowd(plan.seed, plan.num_requests, plan.num_canaries, self._limits)
        ]
        preempted = num_told = 0
        for part in range(plan.num_parts):
            first, last = (
                edge * len(planned) // plan.num_parts for edge in (part, part + 1)
            )
            how = DISTURBANCES[part % len(DISTURBANCES)]
            await self._send_all(planned[first:last], how, deadline)
            name = f"part {part + 1} of {plan.num_parts}"
            await self._rest(name)
            report.seconds = time.monotonic() - started
            report.samples.append(resources.sample(self._root, report.sent))
            now = report.audit["counts"].get("preemptions", 0)
            self._say(
                f"{name}: {report.sent:,} requests in {report.seconds:.0f} s, "
                f"{now - preempted} preemptions, {report.samples[-1]}, "
                f"{report.num_faults} faults"
            )
            for fault in report.faults[num_told:]:
                # now: who ends it early wants to know, too
                self._say(f"fault: {fault}")
            num_told = len(report.faults)
            if now == preempted and last - first >= _MANY:
                report.fault(f"{name}: no request was preempted")
            preempted = now
            if time.monotonic() > deadline:
                self._say("the time is up")
                break
        if not preempted:
            report.fault("no request was preempted")
        for fault in resources.faults_of(report.samples):
            report.fault(fault)
        for fault in report.audit["faults"]:
            report.fault(f"in the engine: {fault}")
        return report

    async def _send_all(
        self, planned: list[Planned], disturbance: str, deadline: float
    ) -> None:
        places = asyncio.Semaphore(self._plan.concurrency)
        middle = planned[len(planned) // 2].number if planned else None

        async def send(one: Planned) -> None:
            async with places:
                if time.monotonic() > deadline:
                    return
                self.report.sent += 1
                try:
                    if one.number == middle:
                        await self._client.disturb(disturbance)
                        self.report.disturbances[disturbance] += 1
                    answer = await self._client.send(self._asked(one))
                except Exception as error:
                    self.report.fault(f"request {one.number} {one.traits}: {error!r}")
                    return
            self._judge(one, answer)

        await asyncio.gather(*map(send, planned))

    def _asked(self, planned: Planned) -> Planned:
        if planned.canary is not None and not self._plan.exact:
            sampling = planned.sampling | {"logprobs": TIE_CANDIDATES}
            return replace(planned, sampling=sampling)
        return planned

    def _judge(self, planned: Planned, answer: Answer) -> None:
        report = self.report
        report.statuses[answer.status] += 1
        report.traits.update(planned.traits)
        report.tokens += sum(len(choice.tokens) for choice in answer.choices)
        faults = verdicts.faults_of(planned, answer)
        if planned.canary is not None and answer.choices:
            (got,), alone = answer.choices, self._alone.get(planned.canary)
            report.canaries["compared"] += 1
            if alone is not None:
                report.canaries["equal"] += got.tokens == alone.tokens
                exact = self._plan.exact
                if trouble := verdicts.differs_from_alone(got, alone, exact=exact):
                    if not exact and self._has_evicted(planned, got, alone):
                        report.canaries["other blocks kept"] += 1
                    else:
                        faults.append(trouble)
        for fault in faults:
            report.fault(
                f"request {planned.number} {planned.traits} of "
                f"{len(planned.prompt)} tokens, {planned.sampling}, "
                f"{planned.options}: {fault}"
            )

    def _has_evicted(self, planned: Planned, got: Choice, alone: Choice) -> bool:
        """Return whether an answer differs only behind the request's first eviction."""
        number, sampling = len(planned.prompt), planned.sampling
        bound = bound_of(
            self._plan.server, planned.options, number, sampling["max_tokens"]
        )
        place = verdicts.first_difference(got, alone)
        if place is None or bound.first_eviction is None:
            return False
        return number + place >= bound.first_eviction

    async def _rest(self, name: str) -> None:
        """Wait until the engine has nothing to do, and take its report."""
        deadline = time.monotonic() + _REST
        before = -1
        while True:
            report = json.loads(self._audit.read_text())
            # the same twice: nothing is on its way either
            if not report["requests"] and report["looks"] == before:
                break
            before = report["looks"]
            if time.monotonic() > deadline:
                self.report.fault(
                    f"{name}: {report['requests']} requests were left behind"
                )
                break
            await asyncio.sleep(0.3)
        self.report.audit = report
        if self._ranks is not None:
            for fault in await self._ranks.compare():
                self.report.fault(f"{name}: {fault}")
            self.report.ranks = self._ranks.counts
