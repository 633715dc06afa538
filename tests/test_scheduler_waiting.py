# SPDX-License-Identifier: Apache-2.0
"""What a request that must wait for a whole chunk does to those behind it.

vLLM's loop over waiting requests reads a hook's 0 as "stop" in one release and as "skip
this one" in another. These tests look at what follows, so that they hold on each.
"""

from __future__ import annotations

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.request import Request

from tests.scheduler_driver import BLOCK_SIZE, Driver, Setup

# beside a prompt that is being read, 4 of a step's 12 tokens are left: no whole chunk
SETUPS = pytest.mark.parametrize(
    "setup",
    [Setup(), Setup(asynchronous=True, max_steps_in_flight=2)],
    ids=["sync", "async"],
)
LONG = 200
SHORT = 2


def reading(setup: Setup, **changes: int) -> Driver:
    """Return a scheduler that is reading a prompt, a chunk in each step."""
    driver = Driver(setup, **changes)
    first = driver.add(LONG)
    for _ in range(2):
        driver.step()
    assert driver.step() == {first: setup.chunk}
    return driver


@SETUPS
def test_nobody_overtakes(setup: Setup) -> None:
    """Short prompts that came later were read from what was left of each step."""
    driver = reading(setup)
    waiting = driver.add(LONG)
    short = []
    while not driver.scheduler.requests[waiting].num_computed_tokens:
        short.append(driver.add(SHORT))
        taken = driver.step()
        assert taken.get(waiting) or not any(name in taken for name in short)
        assert driver.num_steps < 100, "the request at the head starves"
    assert len(short) > 20
    driver.drain(500)


@SETUPS
def test_images_do_not_overtake_either(setup: Setup) -> None:
    """A prompt with an image takes any number of tokens, but its turn comes last."""
    driver = reading(setup)
    waiting = driver.add(LONG)
    image = Request(
        request_id="image",
        prompt_token_ids=[1] * LONG,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        mm_features=[
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier="image",
                mm_position=PlaceholderRange(offset=LONG - 20, length=8),
            )
        ],
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )
    assert image.has_encoder_inputs
    driver.scheduler.add_request(image)
    driver.outputs["image"] = []
    for _ in range(20):
        assert len(driver.step()) == 1
    assert not driver.scheduler.requests[waiting].num_computed_tokens
    assert not image.num_computed_tokens


@SETUPS
def test_a_step_looks_at_one_of_the_waiting(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4,004 prompts waiting, each step walked all of them: 47 ms instead of 1."""
    driver = reading(setup)
    for _ in range(300):
        driver.add(LONG)
    asked = []
    ask = driver.scheduler._reserve_prefill_lookahead

    def count(request: Request, num_computed: int, num_new: int) -> int:
        asked.append(request.request_id)
        return ask(request, num_computed, num_new)

    monkeypatch.setattr(driver.scheduler, "_reserve_prefill_lookahead", count)
    for _ in range(5):
        asked.clear()
        driver.step()
        assert len(asked) == 2


@SETUPS
def test_who_waits_counts_as_waiting(setup: Setup) -> None:
    """They counted as deferred: data parallelism balances on those that wait."""
    driver = reading(setup)
    for _ in range(7):
        driver.add(LONG)
    for _ in range(3):
        driver.step()
        stats = driver.scheduler.make_stats()
        assert stats is not None
        assert stats.num_running_reqs == 1
        assert stats.num_waiting_reqs == 7
        assert stats.num_skipped_waiting_reqs == 0


@pytest.mark.parametrize("num_new_tokens", [0, 8])
def test_who_is_refused_is_let_in_by_the_next_step(num_new_tokens: int) -> None:
    """The answer was kept until vLLM asked, which it does not where it skips a request.

    It does if too many adapters are in the step, or if nothing is left of an image.
    """
    driver = Driver(Setup())
    waiting = driver.add(LONG)
    request = driver.scheduler.requests[waiting]
    driver.scheduler._is_held_back = True
    ask = driver.scheduler._reserve_prefill_lookahead
    assert ask(request, 0, num_new_tokens) == num_new_tokens
    assert waiting in driver.step()


def test_a_prefill_cadence_does_not_starve() -> None:
    """While capacity is what prompts wait for, their cadence does not hold them back:
    3 prompts were done in 200 steps instead of 33."""
    driver = Driver(Setup(), prefill_schedule_interval=8)
    driver.add(1, 500)
    for _ in range(20):
        driver.add(6 * 8)
    for _ in range(160):
        driver.step()
    assert len(driver.finished) == 20
