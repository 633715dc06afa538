# SPDX-License-Identifier: Apache-2.0
"""Two engines with an API server each, which share out requests and not sequences.

Three forms of it: servers that vLLM starts behind one port; those that it starts at a
port each, which it does for mixtures of experts alone; and servers that know nothing of
each other, as vLLM wants it of all other models at several ports.

Engines of experts work in step. What these exchange, vLLM has not for CPUs: its
`CpuCommunicator` ends in the `NotImplementedError` of `all_gatherv`. So the second form
has a model without any, whose configuration speaks of some.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.engines import running_engine
from tests.engine.tiny_models import SMALL_BUDGET, random_prompt, save_tiny_model
from tests.every_form import only_with_every_form
from tests.serving.server import ASK, Server, eventually, free_port, running_server
from vllm_roco.eviction_schedule import EvictionSchedule

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.usefixtures("engine_lock"),
]

NUM_ENGINES = 2
ENGINES = range(NUM_ENGINES)
MAX_NUM_SEQS = 4
BLOCK_SIZE = SMALL_BUDGET.block_size
NUM_NEW = 80

REQUESTS: list[tuple[int, dict[str, Any]]] = [
    (200, {}),
    (190, {"roco_budget": 64}),
    (180, {"roco_policy": "random", "roco_seed": 3}),
    (170, {"roco_policy": "recent"}),
    (165, {"roco_stride": 16}),
    (40, {}),
]
"""Lengths of prompts, and what their requests ask for."""
PROMPTS = [random_prompt(length, seed=length) for length, _ in REQUESTS]
OPTIONS = [options for _, options in REQUESTS]

FREED = "vllm:roco_freed_blocks_total"
MOVED = "vllm:roco_moved_blocks_total"
COUNTED = "vllm:roco_request_bound_tokens_count"
HITS = "vllm:roco_prefix_snapshot_hits_total"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"

RANK = "X-data-parallel-rank"
"""The header that tells vLLM's balancer which engine is to answer."""

LONG = 900
"""Tokens that take longer than a test looks on."""


def freed(length: int, options: dict[str, Any]) -> int:
    """Return the blocks that a request gives back until its last step."""
    schedule = EvictionSchedule(
        BLOCK_SIZE,
        options.get("roco_budget", SMALL_BUDGET.budget),
        options.get("roco_stride", SMALL_BUDGET.stride),
    )
    return schedule.evicted_blocks(length + NUM_NEW - 2)


@dataclass(frozen=True)
class Engines:
    """Engines that answer.

    Attributes:
        servers: Where each of them is asked.
        labels: What each is called on `/metrics`.
        model: The folder of what they serve.
        is_balanced: Whether they are behind one port.
    """

    servers: Sequence[Server]
    labels: Sequence[int]
    model: Path
    is_balanced: bool = False

    def ask(
        self,
        engine: int | None,
        prompt: Sequence[int],
        max_tokens: int = NUM_NEW,
        options: dict[str, Any] | None = None,
        **more: Any,
    ) -> httpx.Response:
        """Ask one of them, or whichever has the least to do."""
        body = {
            **{"model": "tiny", "prompt": list(prompt), "max_tokens": max_tokens},
            **{"temperature": 0, "ignore_eos": True, "return_token_ids": True},
            **{"vllm_xargs": options or {}, **more},
        }
        headers = {}
        if engine is None and not self.is_balanced:
            engine = min(ENGINES, key=self.num_requests)
        elif engine is not None and self.is_balanced:
            headers = {RANK: str(engine)}
        # a connection of its own: vLLM's servers share the port by connections
        return httpx.post(
            f"{self.servers[engine or 0].url}/v1/completions",
            **{"json": body, "headers": headers, "timeout": 300, **ASK},
        )

    def num_requests(self, engine: int) -> float:
        """Return what a balancer of one's own goes by."""
        metrics = self.metrics(engine)
        return metrics.get(RUNNING, 0) + metrics.get(WAITING, 0)

    def tokens(self, engine: int, *request: Any, **more: Any) -> tuple[int, ...]:
        """Return what one of them writes."""
        response = self.ask(engine, *request, **more)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return tuple(choice["token_ids"])

    def metrics(self, engine: int) -> dict[str, float]:
        """Return what the metrics tell of one of them."""
        return self.servers[engine].metrics(self.labels[engine])


@contextlib.contextmanager
def behind_one_port(model: Path, folder: Path, *told: str) -> Iterator[Engines]:
    told = (*told, "--data-parallel-size=2", "--api-server-count=2")
    with running_server(model, list(told), folder / "log") as server:
        yield Engines([server] * NUM_ENGINES, ENGINES, model, is_balanced=True)


@contextlib.contextmanager
def at_a_port_each(model: Path, folder: Path, *told: str) -> Iterator[Engines]:
    port = free_port(NUM_ENGINES + 1)
    told = (
        *(*told, "--data-parallel-size=2", "--data-parallel-size-local=2"),
        "--data-parallel-multi-port-external-lb",
        f"--data-parallel-supervisor-port={port + NUM_ENGINES}",
    )
    with running_server(model, list(told), folder / "log", port) as first:
        second = Server(f"http://127.0.0.1:{port + 1}", first.log, first.pid)
        assert eventually(lambda: _answers(second), 300)
        yield Engines([first, second], ENGINES, model)


@contextlib.contextmanager
def independent(model: Path, folder: Path, *told: str) -> Iterator[Engines]:
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(NUM_ENGINES) as pool:
        starts = [
            running_server(model, list(told), folder / f"log-{engine}")
            for engine in ENGINES
        ]
        servers = list(pool.map(stack.enter_context, starts))
        yield Engines(servers, [0] * NUM_ENGINES, model)


def _answers(server: Server) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return server.is_healthy()
    return False


FORMS: dict[str, tuple[Any, dict[str, int]]] = {
    "one-port": (behind_one_port, {}),
    "port-each": (at_a_port_each, {"num_experts": 4}),
    "independent": (independent, {}),
}
"""How engines start, and what the model's configuration says besides.

Two minutes each.
"""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(form, marks=[only_with_every_form] if number else [])
        for number, form in enumerate(FORMS)
    ],
)
def together(
    request: pytest.FixtureRequest,
    engine_lock: None,
    smollm2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engines]:
    start, changes = FORMS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    roco = {
        name: getattr(SMALL_BUDGET, name)
        for name in (
            *("policy", "shield", "shield_ratio"),
            *("budget", "stride", "chunk", "sink", "recent"),
        )
    }
    told = [
        *(f"--tokenizer={smollm2}", "--served-model-name=tiny", "--dtype=float32"),
        *("--host=127.0.0.1", "--enforce-eager", f"--block-size={BLOCK_SIZE}"),
        *("--max-model-len=1024", f"--max-num-seqs={MAX_NUM_SEQS}"),
        *("--max-num-batched-tokens=256", "--num-gpu-blocks-override=256"),
        *("--attention-backend=roco", "--enable-prompt-tokens-details"),
        f"--additional-config={json.dumps({'roco': roco})}",
    ]
    model = save_tiny_model("llama", folder / "model", **changes)
    with start(model, folder, *told) as engines:
        yield engines


def test_every_engine_answers_as_one_and_tells_of_itself(together: Engines) -> None:
    with running_engine(together.model, SMALL_BUDGET) as alone:
        expected = [
            alone.generate([prompt], NUM_NEW, extra_args=[options])[0]
            for prompt, options in zip(PROMPTS, OPTIONS, strict=True)
        ]
        plain = alone.generate(PROMPTS, NUM_NEW)
    # what was asked for matters
    assert [one != other for one, other in zip(expected, plain, strict=True)] == [
        bool(options) for options in OPTIONS
    ]
    moved = []
    for engine in ENGINES:
        (other,) = {*ENGINES} - {engine}
        begin = together.metrics(engine).get(MOVED, 0)
        idle = told_by_roco(together.metrics(other))
        for (length, options), prompt, answer in zip(
            REQUESTS, PROMPTS, expected, strict=True
        ):
            before = together.metrics(engine)
            assert together.tokens(engine, prompt, NUM_NEW, options) == answer
            after = together.metrics(engine)
            assert after[FREED] - before[FREED] == freed(length, options)
            assert after[COUNTED] - before[COUNTED] == 1
        assert told_by_roco(together.metrics(other)) == idle
        moved.append(together.metrics(engine)[MOVED] - begin)
    assert moved[0] == moved[1] > 0


def told_by_roco(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if ":roco_" in name}


def test_labels_are_vllms(together: Engines) -> None:
    for server in together.servers:
        labels: dict[bool, set[tuple[str, str]]] = {False: set(), True: set()}
        for sample in server.samples():
            if {"model_name", "engine"} <= sample.labels.keys():
                named = sample.labels["model_name"], sample.labels["engine"]
                labels[":roco_" in sample.name].add(named)
        own = together.labels[together.servers.index(server)]
        shown = together.labels if together.is_balanced else [own]
        assert labels[True] == labels[False] == {("tiny", str(each)) for each in shown}


def test_every_engine_refuses_by_itself(together: Engines) -> None:
    for engine in ENGINES:
        # by vLLM's servers, of which the port may lead to either
        for _ in range(3):
            response = together.ask(engine, PROMPTS[0], options={"roco_budget": 128})
            assert response.status_code == 400, response.text
            assert "max_budget = 96" in response.json()["error"]["message"]


def test_every_engine_has_prefixes_of_its_own(together: Engines) -> None:
    prompt = random_prompt(200, seed=1)
    for engine in ENGINES:
        before = [together.metrics(each)[HITS] for each in ENGINES]
        cached = []
        for _ in range(2):
            response = together.ask(engine, prompt, 1)
            assert response.status_code == 200, response.text
            details = response.json()["usage"]["prompt_tokens_details"]
            cached.append((details or {}).get("cached_tokens", 0))
        assert cached == [0, 192]
        hits = [together.metrics(each)[HITS] - before[each] for each in ENGINES]
        assert hits == [int(each == engine) for each in ENGINES]


def test_who_waits_is_counted_and_others_are_sent_elsewhere(together: Engines) -> None:
    """vLLM's balancer hears of it from the engines, whichever server was asked."""
    busy, idle = ENGINES
    num_waiting, num_more = 3, 6
    before = [together.metrics(engine)[COUNTED] for engine in ENGINES]
    with ThreadPoolExecutor(MAX_NUM_SEQS + num_waiting) as pool:

        def join(count: int, max_tokens: int) -> None:
            for _ in range(count):
                prompt = random_prompt(100, seed=len(crowd))
                crowd.append(pool.submit(together.ask, busy, prompt, max_tokens))

            def are_there() -> bool:
                # there are none before the first step
                now = together.metrics(busy)
                found = now.get(RUNNING), now.get(WAITING)
                return found == (MAX_NUM_SEQS, len(crowd) - MAX_NUM_SEQS)

            assert eventually(are_there, 60)

        crowd: list[Future[httpx.Response]] = []
        join(MAX_NUM_SEQS, LONG)
        # those wait until the first of these are done, however little they ask for
        join(num_waiting, 1)
        for _ in range(num_more):
            # what engines tell reaches vLLM's servers ten times a second; till then
            # a server counts what it has sent itself as waiting, several times
            time.sleep(0.25)
            assert together.ask(None, PROMPTS[-1], 1).status_code == 200
        taken = [together.metrics(each)[COUNTED] - before[each] for each in ENGINES]
        assert taken == [MAX_NUM_SEQS + num_waiting, num_more]
        assert not any(request.done() for request in crowd)
        assert {request.result().status_code for request in crowd} == {200}
    for engine in ENGINES:
        assert eventually(lambda: together.num_requests(engine) == 0, 30)  # noqa: B023
    assert together.metrics(idle)[COUNTED] == before[idle] + num_more
