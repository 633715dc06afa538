# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with a budget far below what its clients read and generate."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serving.server import Server, eventually, running_server
from tools.dashboard import __main__ as dashboard

pytestmark = pytest.mark.engine

BUDGET = 128
STRIDE = 32
CHUNK = 64
BLOCK_SIZE = 16
# five sequences of full budget want more
NUM_BLOCKS = 41
MODEL = "small"

STORY = "Once upon a time there was a little fox who lived in the deep dark forest. "
LONG_PROMPT = STORY * 20 + "The little fox"
"""Some 350 tokens, so that its last blocks can only be had by eviction."""


@pytest.fixture(scope="module")
def server(
    engine_lock: None, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    options = {"budget": BUDGET, "stride": STRIDE, "chunk": CHUNK}
    arguments = [
        *("--served-model-name", MODEL),
        # bfloat16 is eight times as slow on a CPU without instructions for it
        *("--dtype", "float32"),
        *("--attention-backend", "roco"),
        *("--additional-config", json.dumps({"roco": options})),
        *("--max-model-len", "1024"),
        *("--max-num-seqs", "8"),
        *("--max-num-batched-tokens", "256"),
        *("--num-gpu-blocks-override", str(NUM_BLOCKS)),
        # so that requests preempt each other
        "--no-scheduler-reserve-full-isl",
        # a small model of few words would fill its output with spaces
        *("--structured-outputs-config.backend", "xgrammar"),
        "--structured-outputs-config.disable_any_whitespace=true",
        "--enable-prompt-tokens-details",
        "--enforce-eager",
    ]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with pytest.MonkeyPatch.context() as patch:
        # for /reset_prefix_cache
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        with running_server(smollm2, arguments, log) as server:
            yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def evicts(server: Server) -> Iterator[None]:
    """Blocks are evicted while the test runs, and all are back when it is done."""
    before = server.metrics()["vllm:roco_freed_blocks_total"]
    yield
    assert server.metrics()["vllm:roco_freed_blocks_total"] > before
    assert eventually(lambda: is_empty(server), timeout=30)


def is_empty(server: Server) -> bool:
    metrics = server.metrics()
    names = (
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:roco_max_sequence_kv_tokens",
    )
    return all(metrics[name] == 0 for name in names)


async def stream(
    client: openai.AsyncOpenAI, prompt: str, max_tokens: int, give_up_after: int | None
) -> int:
    """Generate, and hang up after some tokens if told; return the tokens received."""
    received = 0
    events = await client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body={"ignore_eos": True},
    )
    async with events:
        async for event in events:
            received = event.usage.completion_tokens
            if give_up_after is not None and received >= give_up_after:
                break
    return received


async def watch(server: Server, seen: list[bool]) -> None:
    """Note again and again whether `/health` and `/metrics` answer."""
    while True:
        healthy = await asyncio.to_thread(server.is_healthy)
        seen.append(healthy and bool(await asyncio.to_thread(server.metrics)))
        await asyncio.sleep(0.2)


async def serve_a_crowd(server: Server) -> tuple[list[int], list[bool]]:
    seen: list[bool] = []
    watching = asyncio.create_task(watch(server, seen))
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as client:
        received = await asyncio.gather(
            stream(client, LONG_PROMPT, 200, give_up_after=20),
            *(stream(client, f"{n} {STORY}", 200, None) for n in range(5)),
        )
    watching.cancel()
    return received, seen


@pytest.mark.usefixtures("evicts")
def test_clients_come_go_and_are_preempted(server: Server) -> None:
    before = server.metrics()["vllm:num_preemptions_total"]
    received, seen = asyncio.run(serve_a_crowd(server))

    assert received[1:] == [200] * 5
    assert 20 <= received[0] < 200
    metrics = server.metrics()
    assert metrics["vllm:num_preemptions_total"] > before
    assert metrics["vllm:roco_budget_tokens"] == BUDGET
    # a sequence's bound with one step in flight
    bound = BUDGET + STRIDE + CHUNK + BLOCK_SIZE
    assert BUDGET < metrics["vllm:roco_peak_sequence_kv_tokens"] <= bound
    assert len(seen) > 2
    assert all(seen)


def test_says_once_what_it_does(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "RoCo: " in line]
    assert len(lines) == 1
    for said in (
        "policy roco (contribution shield, ratio 1), budget 128 tokens per sequence,",
        "stride 32, chunk 64, block size 16.",
        "attends over at most 159 tokens after a step and holds at most 240 tokens",
        # as the model's chat template has it
        "Prefix caching: on, behind answers too. Switched off: speculative decoding,",
    ):
        assert said in lines[0]


@pytest.mark.usefixtures("evicts")
def test_a_chat_goes_on_where_its_last_answer_ended(client: openai.OpenAI) -> None:
    """The template tells the server where answers begin; no token has been named."""
    messages: list[Any] = []
    found, ended = [], []
    for number in range(6):
        question = f"Question {number}: {STORY} What does it do next?"
        messages.append({"role": "user", "content": question})
        done = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=45
        )
        answer = done.choices[0].message.content
        messages.append({"role": "assistant", "content": answer})
        assert done.usage is not None
        found.append(done.usage.prompt_tokens_details.cached_tokens)
        ended.append(done.usage.prompt_tokens + done.usage.completion_tokens - 1)
    # the second prompt evicts, too, and begins anew
    assert found == [0, 0, *ended[1:-1]]


def complete(client: openai.OpenAI, **arguments: Any) -> openai.types.Completion:
    return client.completions.create(
        **{"model": MODEL, "prompt": LONG_PROMPT, "temperature": 0} | arguments
    )


@pytest.mark.usefixtures("evicts")
def test_several_samples_of_a_prompt(client: openai.OpenAI) -> None:
    done = complete(client, n=3, temperature=1, max_tokens=40)
    texts = {choice.text for choice in done.choices}
    assert len(done.choices) == len(texts) == 3


def test_seeded_sampling_is_refused(server: Server, client: openai.OpenAI) -> None:
    """It stopped the engine: vLLM cannot rewind a generator on a CPU."""
    with pytest.raises(openai.BadRequestError, match=r"roco: seed = 7 .* Leave seed"):
        complete(client, seed=7, temperature=1, max_tokens=1)
    assert complete(client, seed=7, max_tokens=1).choices[0].finish_reason == "length"


@pytest.mark.usefixtures("evicts")
def test_logprobs(client: openai.OpenAI) -> None:
    (choice,) = complete(client, logprobs=2, max_tokens=40).choices
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == 40
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        # sampling is greedy
        assert chosen == max(top.values()) <= 0


@pytest.mark.usefixtures("evicts")
def test_prompt_logprobs(client: openai.OpenAI) -> None:
    done = complete(client, max_tokens=1, extra_body={"prompt_logprobs": 0})
    first, *others = done.choices[0].prompt_logprobs
    assert first is None
    assert len(others) == done.usage.prompt_tokens - 1
    values = [entry["logprob"] for position in others for entry in position.values()]
    assert max(values) <= 0
    # the second half repeats a sentence that a model this size knows by then
    assert sum(values[len(values) // 2 :]) / (len(values) / 2) > -1


@pytest.mark.usefixtures("evicts")
def test_stop_strings(client: openai.OpenAI) -> None:
    free = complete(client, max_tokens=60).choices[0].text
    stop = free.split()[10]
    (choice,) = complete(client, max_tokens=60, stop=[stop]).choices
    assert choice.finish_reason == "stop"
    assert choice.text == free[: free.index(stop)]


STORY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["fox", "bear"]},
        "places": {
            "type": "array",
            "items": {"enum": ["forest", "river", "hill"]},
            "minItems": 2,
            "maxItems": 3,
        },
    },
    "required": ["animal", "places"],
    "additionalProperties": False,
}

FORBIDDEN = -9999.0
"""What a client is told of a probability of zero, as JSON has no infinity."""


def tell_as_json(
    client: openai.OpenAI, **arguments: Any
) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"{LONG_PROMPT}. Tell it as JSON."}],
        max_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "story", "schema": STORY_SCHEMA},
        },
        **arguments,
    )


@pytest.mark.usefixtures("evicts")
def test_structured_output(client: openai.OpenAI) -> None:
    done = tell_as_json(client, temperature=0)
    story = json.loads(done.choices[0].message.content)
    assert set(story) == {"animal", "places"}
    assert story["animal"] in STORY_SCHEMA["properties"]["animal"]["enum"]
    assert 2 <= len(story["places"]) <= 3


@pytest.mark.usefixtures("evicts")
def test_alternatives_in_structured_output(client: openai.OpenAI) -> None:
    """Samples name the same ones but for tokens that the form forbids.

    Those tie at a probability of zero, and which of them fill the list is chance.
    """
    done = tell_as_json(
        client,
        **{"n": 3, "temperature": 1, "logprobs": True, "top_logprobs": 3},
        extra_body={"top_k": 1},
    )
    told = [choice.logprobs.content for choice in done.choices]
    assert len(told) == 3
    assert len({tuple(each.token for each in tokens) for tokens in told}) == 1
    named, allowed = (
        [
            [
                {each.token: each.logprob for each in place.top_logprobs if fits(each)}
                for place in tokens
            ]
            for tokens in told
        ]
        for fits in (lambda each: True, lambda each: each.logprob > FORBIDDEN)
    )
    for first, *others in zip(*allowed, strict=True):
        assert others == [pytest.approx(first, abs=1e-3)] * 2
    assert allowed != named


def begun_with(client: openai.OpenAI, prompt: list[int], **more: Any) -> int:
    """Return with how many tokens of others a prompt begins, as its client is told."""
    usage = complete(client, prompt=prompt, max_tokens=1, extra_body=more).usage
    return usage.prompt_tokens_details.cached_tokens


def test_clients_are_told_how_much_was_cached(
    server: Server, client: openai.OpenAI
) -> None:
    # two blocks and a half, and four chunks and a half; tokens of no other test
    short, long = list(range(1000, 1040)), list(range(2000, 2290))
    first = [begun_with(client, [*header, 1]) for header in (short, long)]
    assert first == [0, 0]
    assert begun_with(client, [*short, 2, 3]) == 2 * BLOCK_SIZE
    assert begun_with(client, [*long, *range(40)]) == 4 * CHUNK

    salted = [begun_with(client, [*short, 4], cache_salt="a") for _ in range(2)]
    assert salted == [0, 2 * BLOCK_SIZE]
    assert begun_with(client, [*long, 5], cache_salt="a") == 0
    assert begun_with(client, [*short, 6], cache_salt="b") == 0

    reset = httpx.post(f"{server.url}/reset_prefix_cache", timeout=30)
    assert reset.status_code == 200
    assert begun_with(client, [*short, 7]) == begun_with(client, [*long, 7]) == 0


ASK_TWICE = """
import httpx, sys
url, prompt = sys.argv[1:]
body = {"model": "small", "prompt": prompt, "max_tokens": 40, "ignore_eos": True}
for _ in range(2):
    httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
"""


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Debian's package prometheus"
)
def test_prometheus_answers_for_every_panel_of_the_dashboard(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "SCRAPE_SECONDS", 1)
    asks = [sys.executable, "-c", ASK_TWICE, server.url, LONG_PROMPT]
    # 1 where a query has no answer
    assert dashboard.show(server.url, asks, tmp_path / "dashboard.svg") == 0
