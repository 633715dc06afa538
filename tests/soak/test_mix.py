# SPDX-License-Identifier: Apache-2.0
"""The crowd is of every kind, the same each time, and asks for what its names say."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.engine.mixed_models import WINDOW
from tests.soak.bounds import ServerOptions, bound_of
from tests.soak.mix import FIRST_TOKEN, canaries, crowd
from tests.soak.setups import LIMITS, ROCO, limits_for
from vllm_roco.config import RocoConfig
from vllm_roco.request_options.error import RequestOptionError
from vllm_roco.request_options.planner import RequestPlanner
from vllm_roco.request_plans import ResolvedPlan
from vllm_roco.request_size import RequestSizes

SIZE = 16
FITS = limits_for(49152)


def test_the_crowd_is_of_every_kind_and_the_same_each_time() -> None:
    once, again = ([*crowd(5, 2000, 20, FITS)] for _ in range(2))
    assert once == again
    assert once != [*crowd(6, 2000, 20, FITS)]
    traits = Counter(trait for planned in once for trait in planned.traits)
    wanted = {
        *("one token", "short", "middle", "long", "to the limit", "shared prefix"),
        *("n", "logprobs", "prompt logprobs", "structured", "stop", "min_tokens"),
        *("cut off", "aborted", "options", "bad options", "too long", "salt"),
    }
    assert wanted | {"canary"} == traits.keys()
    assert all(traits[trait] >= 20 for trait in wanted)
    assert [each.canary for each in once if each.canary is not None] == [*range(20)]
    for planned in once:
        if "structured" in planned.traits and not planned.is_refused:
            assert planned.prompt[-1] == FIRST_TOKEN
        most = len(planned.prompt) + planned.sampling["max_tokens"]
        assert planned.is_refused or most <= FITS.max_model_len


def test_canaries_hit_nothing_that_others_have_read() -> None:
    alone = canaries(50, FITS, "alone")
    crowded = canaries(50, FITS, "crowd")
    assert [each.prompt for each in alone] == [each.prompt for each in crowded]
    salts = {each.salt for each in alone + crowded} - {None}
    assert len(salts) == sum(each.salt is not None for each in alone + crowded)
    assert all(len(each.prompt) >= 300 for each in alone if each.salt is None)


def test_a_window_holds_some_canaries_whole_while_they_are_answered() -> None:
    """In graphs, only these told that layers with a window gave nothing."""
    shortest = [
        each
        for each in canaries(10, FITS, "alone")
        if len(each.prompt) + 10 < WINDOW and not each.options
    ]
    assert shortest


def test_some_ask_an_adapter_where_there_is_one() -> None:
    limits = limits_for(49152, adapter=True)
    requests = [*crowd(5, 2000, 20, limits)]
    traits = Counter(trait for planned in requests for trait in planned.traits)
    assert traits["adapter"] >= 200 and not traits["prompt logprobs"]
    birds = canaries(20, limits, "alone")
    assert 0 < sum(each.adapter for each in birds) < len(birds)


def blocks_held(in_flight: int) -> list[tuple[int, int]]:
    """Return the bounds of all requests that are taken, ours and the package's."""
    server = ServerOptions(**ROCO, block_size=SIZE, steps_in_flight=in_flight)
    planner = RequestPlanner(RocoConfig(**ROCO, **LIMITS), SIZE, {"a step": 256})
    sizes = RequestSizes(SIZE, in_flight, FITS.max_model_len)
    found = []
    for planned in crowd(1, 3000, 50, FITS):
        length, max_tokens = len(planned.prompt), planned.sampling["max_tokens"]
        if "too long" in planned.traits:
            continue
        try:
            plan = planner.plan(planned.options, length)
        except RequestOptionError:
            assert planned.is_refused, planned
            continue
        assert not planned.is_refused, planned
        resolved = sizes.resolve(plan, length, max_tokens, 71)
        assert isinstance(resolved, ResolvedPlan)
        bound = bound_of(server, planned.options, length, max_tokens)
        found.append((bound.blocks, resolved.max_blocks))
    return found


@pytest.mark.parametrize("in_flight", [1, 2])
def test_options_are_good_or_bad_as_planned_and_bounds_agree(in_flight: int) -> None:
    """Two workings of one page: the audit's bound is no looser than the planned one."""
    found = blocks_held(in_flight)
    assert len(found) > 2000
    assert [pair for pair in found if pair[0] != pair[1]] == []
