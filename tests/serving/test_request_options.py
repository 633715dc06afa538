# SPDX-License-Identifier: Apache-2.0
"""Options of requests over HTTP: taken, or a 400 for that request alone."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.engine.tiny_models import save_tiny_model
from tests.serving.server import ASK, Server, running_server
from vllm_roco.request_options.names import OPTIONS

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODEL = "small"
PROMPT = "Once upon a time there was a little fox who lived in the deep dark forest."
FRONT_PAGE = Path(__file__).parents[2] / "README.md"
PAGE = Path(__file__).parents[2] / "docs" / "request-options.md"
NUM_FUZZED = int(os.environ.get("ROCO_FUZZED_REQUESTS", "200"))
"""Requests of the fuzz; 2,000 look for more."""


@pytest.fixture(scope="module")
def server(
    engine_lock: None, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    options = {
        **{"budget": 256, "stride": 32, "chunk": 64},
        **{"max_budget": 1024, "allow_full": True},
    }
    arguments = [
        *("--served-model-name", MODEL),
        *("--tokenizer", str(smollm2)),
        *("--dtype", "float32"),
        *("--attention-backend", "roco"),
        *("--additional-config", json.dumps({"roco": options})),
        *("--max-model-len", "4096"),
        *("--max-num-seqs", "8"),
        *("--max-num-batched-tokens", "264"),
        # less than the longest request may come to hold
        *("--num-gpu-blocks-override", "129"),
        # each checks by itself
        *("--api-server-count", "2"),
        "--enforce-eager",
    ]
    folder = tmp_path_factory.mktemp("server")
    # whatever it says: 3,000 tokens of a real model take a while to read
    model = save_tiny_model(
        "llama",
        folder / "model",
        vocab_size=len(AutoTokenizer.from_pretrained(smollm2)),
        max_position_embeddings=4096,
    )
    with running_server(model, arguments, folder / "log.txt") as server:
        yield server


MESSAGES = [{"role": "user", "content": PROMPT}]
ENDPOINTS: dict[str, dict[str, Any]] = {
    "completions": {"prompt": PROMPT, "max_tokens": 2},
    "chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "responses": {"input": PROMPT, "max_output_tokens": 2},
    "messages": {"messages": MESSAGES, "max_tokens": 2},
}


def body(options: Any, endpoint: str = "completions", **more: Any) -> dict[str, Any]:
    arguments = {"model": MODEL, "temperature": 0, "vllm_xargs": options}
    return ENDPOINTS[endpoint] | arguments | more


def send(
    server: Server, options: Any, endpoint: str = "completions", **more: Any
) -> httpx.Response:
    asked = body(options, endpoint, **more)
    url = f"{server.url}/v1/{endpoint}"
    return httpx.post(url, json=asked, timeout=120, **ASK)


async def send_all(server: Server, bodies: list[dict[str, Any]]) -> list[Any]:
    """Send requests to `/v1/completions` at once; return the answers in order."""
    limits = httpx.Limits(max_connections=32)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        url = f"{server.url}/v1/completions"
        return await asyncio.gather(*(client.post(url, json=each) for each in bodies))


def refused(response: httpx.Response, *says: str) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    place = 0
    for part in ("roco: ", *says):
        place = error["message"].find(part, place)
        assert place >= 0, f"{part!r} is not in {error['message']!r}"
    return error


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_takes_and_refuses_options(
    server: Server, endpoint: str
) -> None:
    for options in (
        {"roco_budget": 128, "roco_mode": "prompt"},
        {"roco": '{"budget": 128, "mode": "prompt"}'},
    ):
        answer = send(server, options, endpoint)
        assert answer.status_code == 200, answer.text
    error = refused(
        send(server, {"roco_budget": 2048}, endpoint),
        *("budget = 2048 is more than", "max_budget = 1024", "Use at most 1024"),
    )
    # Anthropic's errors have no such field
    if endpoint != "messages":
        assert error["param"] == "roco_budget"
    refused(send(server, {"roco": '{"buget": 64}'}, endpoint), "unknown option 'buget'")


GOOD: list[dict[str, Any]] = [
    {},
    {"roco_budget": 0.5},
    {"roco_budget": "full"},
    {"roco_mode": "full"},
    {"roco_mode": "generation", "roco_budget": 256, "roco_recent": 64},
    {"roco_mode": "auto"},
    {"roco_policy": "random", "roco_seed": 7},
    {"roco_policy": "h2o", "roco_stride": 16, "roco_chunk": 128},
    {"roco_shield": "deviation", "roco_shield_ratio": 0.3, "roco_sink": 0},
    {"another_plugins": [1, 2]},
]
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"roco_budget": 100}, "roco_budget", "Use 96 or 112."),
    ({"roco_budget": "64"}, "roco_budget", "budget = '64' is not allowed in"),
    ({"roco_budget": 64.0}, "roco_budget", "a whole number of tokens"),
    ({"roco_stride": [16]}, "roco_stride", "stride = [16] is not allowed"),
    ({"roco_chunk": 512}, "roco_chunk", "Use at most 256, or ask the operator"),
    ({"roco_sink": -1}, "roco_sink", "at least 0"),
    ({"roco_seed": 7}, "roco_seed", "seed = 7 would do nothing"),
    ({"roco_mode": "full", "roco_stride": 64}, "roco_stride", "nothing is evicted"),
    ({"roco_mode": "none"}, "roco_mode", '"both" or "prompt" or'),
    ({"roco_row": [0]}, "roco", "unknown option 'row'"),
    ({"roco": "{}", "roco_sink": 0}, "roco", "Use one form for all options"),
    ({"roco": "budget"}, "roco", "is not a dictionary of options"),
    # whatever JSON can carry in a string
    ({"roco": '{"\\ud800": "\\ud800"}'}, "roco", "unknown option"),
    ({"roco": "[" * 50_000}, "roco", "is not a dictionary of options"),
    ({"roco": '{"budget": 1e400}'}, "roco_budget", "budget = inf is not allowed"),
    ({"roco": '{"sink": ' + "9" * 400 + "}"}, "roco_sink", "Use at most 2147483647"),
]


@pytest.mark.parametrize("options", GOOD, ids=repr)
def test_good_options(server: Server, options: dict[str, Any]) -> None:
    answer = send(server, options)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("options", "param", "says"), BAD)
def test_bad_options(
    server: Server, options: dict[str, Any], param: str, says: str
) -> None:
    assert refused(send(server, options), says)["param"] == param
    assert server.is_healthy()


def test_the_prompts_length_counts(server: Server) -> None:
    prompt = list(range(100, 600))
    options = {"roco_mode": "generation", "roco_budget": 512}
    assert send(server, options, prompt=prompt).status_code == 200
    error = refused(
        send(server, options | {"roco_budget": 528}, prompt=prompt),
        *("keeps the prompt (500 tokens)", "Use a budget of at most 512"),
    )
    assert error["param"] == "roco_mode"


def test_what_could_never_fit_is_refused(server: Server) -> None:
    """It was an HTTP 500, and the message was in the log alone."""
    full = {"roco_mode": "full"}
    prompt = list(range(100, 200))
    # whichever of the API servers is asked
    for _ in range(8):
        error = refused(
            send(server, full, prompt=prompt, max_tokens=3000),
            "max_tokens = 3000 after a prompt of 100 tokens may hold 194 blocks of 16",
            "the KV cache has 128",
            "Use a max_tokens of at most 1948, or mode",
        )
        assert error["param"] == "max_tokens"
    error = refused(
        send(server, full, prompt=prompt * 30, max_tokens=1),
        *("a prompt of 3000 tokens", "together at most 2048"),
    )
    assert error["param"] == "input_tokens"
    assert server.is_healthy()
    assert send(server, full, prompt=prompt).status_code == 200
    assert send(server, {}, prompt=prompt * 30).status_code == 200


def test_a_nested_dictionary_is_vllms_own_error(server: Server) -> None:
    """`docs/request-options.md` says so; the same as a JSON string is taken."""
    answer = send(server, {"roco": {"budget": 64}})
    assert answer.status_code == 400
    assert "roco: " not in answer.text


def test_one_bad_request_among_many(server: Server) -> None:
    """Each asks for something else, and those that are good get their answers."""
    alone = send(server, {}, max_tokens=8).json()["choices"][0]["text"]
    bodies = [body({"roco_budget": 128}, max_tokens=8) for _ in range(12)]
    bodies[5] = body({"roco_budget": 130}, max_tokens=8)
    answers = asyncio.run(send_all(server, bodies))
    refused(answers.pop(5), "budget = 130")
    assert {answer.status_code for answer in answers} == {200}
    # too short for any eviction
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {alone}


def test_several_prompts_and_several_samples(server: Server) -> None:
    for more in ({"prompt": [PROMPT, "The fox", "A bear"]}, {"n": 3}):
        if "n" in more:
            more["temperature"] = 1
        answer = send(server, {"roco_budget": 128}, **more)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"]) == 3
        refused(send(server, {"roco_budget": 130}, **more), "Use 128 or 144")


def test_a_stream_has_the_error_as_its_event(server: Server) -> None:
    """vLLM has sent the status by then, as with errors of its own."""
    answer = send(server, {"roco_budget": 130}, stream=True)
    assert answer.status_code == 200
    event = answer.text.partition("data: ")[2].partition("\n")[0]
    error = json.loads(event)["error"]
    assert error["code"] == 400
    assert "roco: budget = 130 is not a multiple" in error["message"]
    assert "roco: " not in send(server, {"roco_budget": 128}, stream=True).text


def any_value(draw: random.Random, depth: int = 0) -> Any:
    """Return what `vllm_xargs` may hold, and what it may not."""
    numbers = (
        draw.choice([16, 32, 48, 64, 128, 256, 512]),
        draw.randint(-20, 2000),
        draw.choice([0, -1, 2**31 - 1, 2**31, 2**63, 10**30]),
        draw.random(),
        draw.choice([0.0, 1.0, 64.0, -0.5, 1e308]),
    )
    words = ("full", "both", "prompt", "generation", "auto", "full", "peak", "h2o")
    others = ("roco", "random", "", "64", "\x00", "{}", "null", True, False, None)
    if depth == 0 and draw.random() < 0.1:
        return draw.choice([[], {}, [any_value(draw, 1), any_value(draw, 1)]])
    return draw.choice([*numbers, *numbers, draw.choice(words), draw.choice(others)])


ALLOWED: dict[str, list[Any]] = {
    "budget": [16, 64, 128, 256, 512, 1024, 0.1, 0.5, "full"],
    "stride": [16, 32, 64],
    "chunk": [16, 64, 256],
    "sink": [0, 16, 50],
    "recent": [0, 32, 50],
    "mode": ["both", "prompt", "generation", "auto", "full"],
    "policy": ["roco", "h2o", "random", "recent"],
    "shield": ["contribution", "peak", "deviation"],
    "shield_ratio": [0, 0.3, 1],
    "seed": [0, 7],
}
"""What is good of each option, though not together with anything else."""


def any_options(draw: random.Random) -> dict[str, Any]:
    number = draw.choice([1, 1, 2, 3])
    if draw.random() < 0.5:
        names = [draw.choice(OPTIONS) for _ in range(number)]
        options = {name: draw.choice(ALLOWED[name]) for name in names}
    else:
        names = [*OPTIONS, *OPTIONS, "row", "buget", "max_budget"]
        options = {draw.choice(names): any_value(draw) for _ in range(number)}
    if draw.random() < 0.3:
        return {"roco": json.dumps(options)}
    return {f"roco_{name}": value for name, value in options.items()}


def test_whatever_is_asked_for_is_a_200_or_a_400(server: Server) -> None:
    """A neighbour without options gets the same answer all the while."""
    draw = random.Random(1)
    neighbour = body({}, max_tokens=4)
    alone = httpx.post(
        f"{server.url}/v1/completions", json=neighbour, timeout=120, **ASK
    )
    asked = [any_options(draw) for _ in range(NUM_FUZZED)]
    bodies = []
    for options in asked:
        bodies.append(body(options, max_tokens=1))
        if len(bodies) % 20 == 0:
            bodies.append(neighbour)
    answers = asyncio.run(send_all(server, bodies))

    codes: Counter[int] = Counter()
    for sent, answer in zip(bodies, answers, strict=True):
        codes[answer.status_code] += 1
        assert answer.status_code in (200, 400), (sent, answer.text)
        if sent is neighbour:
            text = answer.json()["choices"][0]["text"]
            assert text == alone.json()["choices"][0]["text"]
    print(f"{NUM_FUZZED} requests with options, {len(answers)} in all: {dict(codes)}")
    # both happen often
    assert min(codes[200], codes[400]) >= NUM_FUZZED // 8, codes
    assert server.is_healthy()


def examples(language: str) -> list[str]:
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [block for block in blocks if "localhost:8000" in block]


def to(server: Server, example: str) -> str:
    at = example.replace("http://", "").replace("localhost:8000", server.url)
    return at.replace("MODEL", MODEL)


def test_the_pages_curl_examples_run(server: Server) -> None:
    found = examples("bash")
    front = re.findall(
        r"^ {4}(curl .*?}'\n)", FRONT_PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found and front
    for example in [*found, *front]:
        done = subprocess.run(
            ["bash", "-ec", to(server, example)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout)["choices"], done.stdout


def test_the_pages_client_examples_run(server: Server) -> None:
    found = examples("python")
    assert found
    for example in found:
        names: dict[str, Any] = {}
        exec(to(server, example), names)
        assert names["answer"].choices
