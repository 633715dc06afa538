# SPDX-License-Identifier: Apache-2.0
"""A tenant learns nothing of what another one's prefixes are, from content or timing.

What a step computes decides how long it takes. So the same requests are served in two
worlds, which differ in what the other tenant has asked alone: in one, the very prompts;
in the other, as long ones of other tokens. Step by step, the same must be scheduled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler_driver import Driver, Setup

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"roco_mode": "full"},
    {"roco_budget": 24, "roco_sink": 4, "roco_recent": 4},
    {"roco_chunk": 4},
)
OURS, THEIRS = 0, 500
"""What tokens of the two kinds of prompts begin at."""


@dataclass(frozen=True)
class Asked:
    """A request that both tenants may send.

    Attributes:
        length: Of its prompt, which begins as all others do.
        num_common: Tokens at most that it has in common with others.
        max_tokens: Of its answer.
        options: Of RoCo.
        pause: Steps before the next request.
    """

    length: int
    num_common: int
    max_tokens: int
    options: dict[str, Any]
    pause: int

    def prompt(self, number: int, kind: int) -> list[int]:
        """Return its tokens; those of two kinds share none."""
        common = min(self.num_common, self.length)
        own = [kind + 100 + number] * (self.length - common)
        return [kind + 1 + place % 90 for place in range(common)] + own


asked = st.builds(
    Asked,
    length=st.integers(1, 90),
    num_common=st.sampled_from([0, 20, 48, 90]),
    max_tokens=st.integers(1, 20),
    options=st.sampled_from(OPTIONS),
    pause=st.integers(0, 12),
)
setups = st.builds(
    Setup,
    caching=st.just(True),
    allow_full=st.just(True),
    max_budget=st.just(32),
    spare_blocks=st.sampled_from([30, 1000]),
    asynchronous=st.booleans(),
    windows=st.sampled_from([(), (8,)]),
    prefix_hits=st.sampled_from(["exact", "longest"]),
    turn_end_token_ids=st.sampled_from([(), (20, 60, THEIRS + 20, THEIRS + 60)]),
).filter(lambda setup: not setup.windows or setup.prefix_hits == "exact")
Seen = list[dict[str, int]]


def served(
    setup: Setup, others: list[Asked], kind: int, ours: list[Asked], salt: str | None
) -> tuple[Seen, list[Any]]:
    """Let both tenants ask; return what each step scheduled, and what we are told.

    Args:
        setup: Of the scheduler.
        others: What the other tenant asks, before us and in our first steps.
        kind: Of its prompts.
        ours: What we ask.
        salt: Ours.
    """
    driver = Driver(setup)
    seen: Seen = []
    names = []
    for requests, own_kind, own_salt in ((others, kind, "b"), (ours, OURS, salt)):
        for number, one in enumerate(requests):
            name = driver.add(
                one.length,
                one.max_tokens,
                prompt=one.prompt(number, own_kind),
                cache_salt=own_salt,
                extra_args=dict(one.options) or None,
            )
            if requests is ours:
                names.append(name)
            seen += [driver.step() for _ in range(one.pause)]
    last = driver.num_steps + 2000
    while driver.scheduler.has_requests() or driver.num_in_flight:
        assert driver.num_steps < last
        seen.append(driver.step())
    told = [
        (driver.outputs[name], getattr(driver.finished[name], "num_cached_tokens", 0))
        for name in names
    ]
    return seen, told


@settings(max_examples=100, deadline=None)
@given(setups, st.lists(asked, min_size=1, max_size=4), st.lists(asked, max_size=3))
def test_prefixes_of_another_tenant_change_no_step(
    setup: Setup, ours: list[Asked], others: list[Asked]
) -> None:
    same = served(setup, [*others, *ours], OURS, ours, "a")
    different = served(setup, [*others, *ours], THEIRS, ours, "a")
    assert same == different


def test_without_a_salt_they_do() -> None:
    """Or the test above could not fail."""
    ours = [Asked(80, 90, 4, {}, 0)]
    setup = Setup(caching=True)
    again = [Asked(80, 90, 4, {}, 30)]
    same, told = served(setup, again, OURS, ours, "b")
    different, told_different = served(setup, again, THEIRS, ours, "b")
    assert same != different
    assert told[0][0] == told_different[0][0]
