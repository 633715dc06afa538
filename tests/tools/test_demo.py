# SPDX-License-Identifier: Apache-2.0
"""`demo.sh` from end to end, as its user meets it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch

from tests.tools.demo_command import DEMO, assert_nothing_is_left, run_demo

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("engine_lock")]

BUDGET, STRIDE, CHUNK, BLOCK_SIZE = 192, 64, 64, 16
PROMPT_TOKENS, GENERATIONS, TOKENS = 512, 2, 192
SMALL = [
    *("--budget", str(BUDGET)),
    *("--stride", str(STRIDE)),
    *("--chunk", str(CHUNK)),
    *("--prompt-tokens", str(PROMPT_TOKENS)),
    *("--generations", str(GENERATIONS)),
    *("--tokens", str(TOKENS)),
]

ROW = re.compile(
    r"^ +(?P<name>(?:question|generation) \d) +(?P<prompt>\S+) +(?P<cached>\S+)"
    r" +(?P<written>\S+) +(?P<budget>\S+) +(?P<held>\S+) +(?P<full>\S+)"
    r" +(?P<freed>\S+) +(?P<answer>\S+) +(?P<first>\S+)",
    re.MULTILINE,
)
FOOTER = re.compile(
    r"^ +by /metrics +(?P<budget>\S+) +(?P<held>\S+) +(?P<freed>\S+) *$", re.MULTILINE
)


def test_table_and_picture(
    smollm2: Path, environment: dict[str, str], port: int, tmp_path: Path
) -> None:
    picture = tmp_path / "new" / "kv.png"

    done = run_demo(
        [*SMALL, "--model", str(smollm2), "--port", str(port)]
        + ["--picture", str(picture)],
        environment,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    rows = [match.groupdict() for match in ROW.finditer(done.stdout)]
    assert [row.pop("name") for row in rows] == [
        *("question 1", "question 2"),
        *(f"generation {number + 1}" for number in range(GENERATIONS)),
    ]
    verdicts = [row.pop("answer") for row in rows]
    assert set(verdicts[:2]) <= {"right", "wrong"}
    assert set(verdicts[2:]) == {"-"}
    assert all(float(row.pop("first").replace(",", "")) > 0 for row in rows)
    numbers = [
        {key: int(text.replace(",", "")) for key, text in row.items()} for row in rows
    ]
    for row in numbers:
        # the last token is written but not read again
        computed = row["prompt"] + row["written"] - 1
        assert 0 <= row["full"] - computed < 2 * BLOCK_SIZE
        assert row["budget"] <= row["held"]
        assert row["held"] <= row["budget"] + STRIDE + CHUNK + BLOCK_SIZE
        assert row["freed"] % (STRIDE // BLOCK_SIZE) == 0
    first, second, *generations = numbers
    # every second generation asks for half of the server's budget
    assert [row["budget"] for row in generations] == [BUDGET, BUDGET // 2]
    assert first["budget"] == second["budget"] == BUDGET
    assert PROMPT_TOKENS - 30 < first["prompt"] <= PROMPT_TOKENS
    # the same text but for the question, up to the last chunk's end
    assert [row["cached"] for row in numbers] == [0, PROMPT_TOKENS - CHUNK, 0, 0]
    assert second["cached"] > BUDGET + STRIDE, "past the first eviction"
    assert [row["written"] for row in generations] == [TOKENS] * GENERATIONS
    # what they give back, they give back while they write
    assert [row["prompt"] for row in generations] == [BUDGET // 2] * GENERATIONS
    assert all(row["freed"] > 0 for row in (first, *generations))
    footer = FOOTER.search(done.stdout)
    assert footer is not None
    assert int(footer["budget"]) == BUDGET
    assert int(footer["held"]) == max(row["held"] for row in numbers)
    assert int(footer["freed"]) == sum(row["freed"] for row in numbers)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "vllm serve MODEL --attention-backend roco" in done.stdout
    on_cpu = not torch.cuda.is_available()
    assert ("tools/vllm_cpu_alias" in done.stdout) == on_cpu
    assert_nothing_is_left(environment, port)


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_interrupt_leaves_nothing(
    smollm2: Path, environment: dict[str, str], port: int
) -> None:
    arguments = [*SMALL, "--model", str(smollm2), "--port", str(port)]
    demo = subprocess.Popen(
        [DEMO, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what a terminal signals on Ctrl-C is the process group
        start_new_session=True,
        # a shell's background job ignores Ctrl-C, and so would all that it starts
        preexec_fn=_hear_interrupts,
    )
    try:
        assert demo.stdout is not None
        read = iter(demo.stdout.readline, "")
        assert any("[4/5] requests" in line for line in read)
        started = psutil.Process(demo.pid).children(recursive=True)
        assert len(started) > 1, "the server and its engine"

        os.killpg(demo.pid, signal.SIGINT)
        _, errors = demo.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)

    assert demo.returncode == 130
    assert errors.strip() == "stopped, and nothing is left running"
    _, alive = psutil.wait_procs(started, timeout=5)
    assert alive == []
    assert_nothing_is_left(environment, port)
