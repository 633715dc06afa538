# SPDX-License-Identifier: Apache-2.0
"""The proof that the budget acts, as a user gets it: from a server and from `LLM`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.tiny_models import save_tiny_model
from tests.fresh_python import FreshPython, run_python
from vllm_roco.eviction_schedule import EvictionSchedule

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("engine_lock")]

SCHEDULE = EvictionSchedule(block_size=16, budget=64, stride=32)
CHUNK = 64
OPTIONS = {"budget": 64, "stride": 32, "chunk": CHUNK, "sink": 16, "recent": 16}

PROMPT = list(range(100, 140))
SAVED_BY_BLOCKS = 32
"""Of a prompt that is read without eviction, all full blocks but the last token."""
LONG_PROMPT = list(range(100, 240))
"""Two chunks and more, past the first eviction."""
NUM_ENGINES = 2
NUM_REQUESTS = 4
NUM_NEW_TOKENS = 100

# the last token is sampled but never computed
FREED_PER_REQUEST = SCHEDULE.evicted_blocks(len(PROMPT) + NUM_NEW_TOKENS - 1)
# two chunks are in flight under asynchronous scheduling
MOST_TOKENS = 16 * SCHEDULE.max_blocks(2 * CHUNK)

WHOLE = 16 * 9
"""Of prompt and answer, in whole blocks: less than the most of a longer sequence."""

FREED = "vllm:roco_freed_blocks_total"
MOVED = "vllm:roco_moved_blocks_total"
MAX = "vllm:roco_max_sequence_kv_tokens"
PEAK = "vllm:roco_peak_sequence_kv_tokens"
PEAK_BOUND = "vllm:roco_peak_request_bound_tokens"
BUDGET = "vllm:roco_budget_tokens"
BOUNDS = (REQUESTS, BOUND) = (
    "vllm:roco_request_bound_tokens_count",
    "vllm:roco_request_bound_tokens_sum",
)
LIVE = "vllm:roco_prefix_live_snapshots"
PUBLISHED = "vllm:roco_prefix_published_snapshots_total"
DEAD = "vllm:roco_prefix_dead_snapshots_total"
HITS = "vllm:roco_prefix_snapshot_hits_total"
BLOCK_HITS = "vllm:roco_prefix_block_hits_total"
SAVED = "vllm:roco_prefix_saved_tokens_total"
WAITS = "vllm:roco_prefix_waits_total"
PREFIX = (LIVE, PUBLISHED, DEAD, HITS, BLOCK_HITS, SAVED, WAITS)

START_SECONDS = 600

OFFLINE = """
import dataclasses, json, sys
from vllm import LLM, SamplingParams
from vllm_roco.metrics import get_metrics

def main() -> None:
    model, options, prompt, requests, new_tokens = map(json.loads, sys.argv[1:])
    llm = LLM(
        model,
        attention_backend="ROCO",
        additional_config={"roco": options},
        block_size=16,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=requests,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    llm.generate(
        [{"prompt_token_ids": prompt}] * requests,
        SamplingParams(max_tokens=new_tokens, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    print("METRICS", json.dumps(dataclasses.asdict(get_metrics(llm))))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model: what is written does not matter here, only how much."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny-llama"))


@dataclass(frozen=True)
class Server:
    """A `vllm serve` that answers."""

    url: str

    def scrape(self) -> dict[str, list[float]]:
        """Return {sample name: one value per engine}."""
        samples: dict[tuple[str, int], float] = {}
        text = requests.get(f"{self.url}/metrics", timeout=60).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("vllm:roco"):
                    assert sample.labels["model_name"] == "the-model"
                    if "le" in sample.labels:
                        continue
                    key = sample.name, int(sample.labels["engine"])
                    assert key not in samples
                    samples[key] = sample.value
        return {
            name: [samples[name, engine] for engine in range(NUM_ENGINES)]
            for name in (FREED, MOVED, MAX, PEAK, PEAK_BOUND, BUDGET, *BOUNDS, *PREFIX)
        }

    def complete(self, prompt: list[int], num_new_tokens: int) -> None:
        """Generate so many tokens after a prompt."""
        response = requests.post(
            f"{self.url}/v1/completions",
            json={
                "model": "the-model",
                "prompt": prompt,
                "max_tokens": num_new_tokens,
                "ignore_eos": True,
                "temperature": 0,
            },
            timeout=600,
        )
        assert response.json()["usage"]["completion_tokens"] == num_new_tokens


@contextlib.contextmanager
def serving(model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """Run `vllm serve` and yield its address; show its log if it does not start."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model),
        "--served-model-name=the-model",
        f"--port={port}",
        "--host=127.0.0.1",
        "--attention-backend=ROCO",
        f"--additional-config={json.dumps({'roco': OPTIONS})}",
        "--block-size=16",
        "--max-model-len=512",
        "--max-num-seqs=4",
        "--max-num-batched-tokens=256",
        # bfloat16 is eight times as slow on a CPU without instructions for it
        "--dtype=float32",
        "--enforce-eager",
        *arguments,
    ]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = FreshPython(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{' '.join(command)} did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except (requests.ConnectionError, requests.Timeout):
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            ["--api-server-count=1", "--disable-log-stats"],
            id="one-server-without-statistics",
        ),
        pytest.param(["--api-server-count=2"], id="two-servers"),
    ],
)
def test_a_server_shows_what_the_budget_does(
    arguments: list[str], model: Path, smollm2: Path, tmp_path: Path
) -> None:
    arguments = [
        *(f"--data-parallel-size={NUM_ENGINES}", f"--tokenizer={smollm2}"),
        *arguments,
    ]
    with serving(model, tmp_path / "log", *arguments) as url:
        server = Server(url)
        zeros = [0] * NUM_ENGINES
        budgets = [OPTIONS["budget"]] * NUM_ENGINES
        assert server.scrape() == {
            FREED: zeros,
            MOVED: zeros,
            MAX: zeros,
            PEAK: zeros,
            PEAK_BOUND: zeros,
            BUDGET: budgets,
            **dict.fromkeys((*BOUNDS, *PREFIX), zeros),
        }
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            done = [
                pool.submit(server.complete, PROMPT, NUM_NEW_TOKENS)
                for _ in range(NUM_REQUESTS)
            ]
            held = set()
            while not all(future.done() for future in done):
                held.update(server.scrape()[MAX])
        for future in done:
            future.result()
        # each connection may reach another server: all must agree, and at once
        scrapes = [server.scrape() for _ in range(8)]
        # one after another, so that all but the first of an engine begin with a hit
        for _ in range(NUM_ENGINES + 1):
            server.complete(LONG_PROMPT, 1)
        both = server.scrape()
    assert held - {0}
    assert max(held) <= MOST_TOKENS
    assert scrapes == [scrapes[0]] * 8
    assert sum(scrapes[0][FREED]) == NUM_REQUESTS * FREED_PER_REQUEST
    for moved, freed in zip(scrapes[0][MOVED], scrapes[0][FREED], strict=True):
        assert moved <= freed
        assert bool(moved) == bool(freed)
    assert scrapes[0][MAX] == zeros
    assert sum(scrapes[0][REQUESTS]) == NUM_REQUESTS
    assert sum(scrapes[0][BOUND]) == NUM_REQUESTS * WHOLE
    assert max(scrapes[0][PEAK]) <= max(scrapes[0][PEAK_BOUND]) == WHOLE
    assert sum(both[REQUESTS]) == NUM_REQUESTS + NUM_ENGINES + 1
    assert OPTIONS["budget"] < max(scrapes[0][PEAK]) <= MOST_TOKENS
    for engine in range(NUM_ENGINES):
        short = {name: numbers[engine] for name, numbers in scrapes[0].items()}
        long = {name: both[name][engine] - short[name] for name in short}
        # all but the first of an engine, however many it was given
        assert short[BLOCK_HITS] == max(0, short[REQUESTS] - 1)
        assert short[SAVED] == SAVED_BY_BLOCKS * short[BLOCK_HITS]
        assert short[WAITS] <= short[BLOCK_HITS]
        assert short[LIVE] == short[PUBLISHED] == short[DEAD] == short[HITS] == 0
        assert long[PUBLISHED] == long[LIVE] == min(1, long[REQUESTS])
        assert long[HITS] == long[REQUESTS] - long[PUBLISHED]
        assert long[SAVED] == 2 * CHUNK * long[HITS]
        assert long[DEAD] == long[WAITS] == long[BLOCK_HITS] == 0


def test_an_llm_tells_what_the_budget_did(model: Path, tmp_path: Path) -> None:
    """Its engine has a process of its own."""
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE)
    arguments = map(
        json.dumps, (str(model), OPTIONS, PROMPT, NUM_REQUESTS, NUM_NEW_TOKENS)
    )
    run = run_python(
        [script, *arguments],
        environment=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stderr=subprocess.STDOUT,
        timeout=START_SECONDS,
    )
    assert run.returncode == 0, run.stdout
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("METRICS"))
    (engine,) = json.loads(line.removeprefix("METRICS"))["engines"]
    assert engine["engine"] == 0
    assert engine["budget_tokens"] == OPTIONS["budget"]
    counts, total = engine["request_bounds"]
    assert (sum(counts), total) == (NUM_REQUESTS, NUM_REQUESTS * WHOLE)
    # a tuple in JSON
    counts = dict(zip(PREFIX, engine["prefix_cache"], strict=True))
    assert counts[BLOCK_HITS] == NUM_REQUESTS - 1
    assert counts[SAVED] == SAVED_BY_BLOCKS * counts[BLOCK_HITS]
    assert counts[WAITS] <= counts[BLOCK_HITS]
    assert counts[LIVE] == counts[PUBLISHED] == counts[DEAD] == counts[HITS] == 0
    assert engine["freed_blocks"] == NUM_REQUESTS * FREED_PER_REQUEST
    assert 0 < engine["moved_blocks"] <= engine["freed_blocks"]
    assert engine["max_sequence_kv_tokens"] == 0
    assert OPTIONS["budget"] < engine["peak_sequence_kv_tokens"] <= MOST_TOKENS
