# SPDX-License-Identifier: Apache-2.0
"""Gives the doors by which options come in whatever there is, without an engine.

    python -m tests.soak.hostile --cases 20000

What is not taken must be one clear error: from a request what a client may be told,
with a status that says that the client is wrong; at a start argparse's, or ours.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.exception_handling.error_response import (
    create_error_response,
)
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.input_processor import InputProcessor

import tests.soak.environment  # noqa: F401 -- before vLLM
from tests.configs import engine_config
from tests.request_options import test_any_options as requests
from tests.request_options.planning import SERVER
from vllm_roco.config import NAMESPACE, RocoConfig
from vllm_roco.validation import request_planner, validated_config

BLOCK_SIZE = 16
LONGEST_MESSAGE = 1000
MOST_INTEGER = 2**31 - 1
SERVER_OPTIONS = [*RocoConfig.__dataclass_fields__]

huge = st.one_of(
    st.sampled_from([10**9, 2**63, 10**30, 10**400, 10**5000, -(10**5000)]),
    st.sampled_from([1e308, -1e308, float("nan"), float("inf"), -float("inf"), -0.0]),
    st.sampled_from(["x" * 100_000, "\ud800", "\x00", "é" * 300, "\u202e", "🦜"]),
    # deeper than Python follows
    st.sampled_from([50, 2000]).map(
        lambda depth: functools.reduce(lambda inner, _: [inner], range(depth), 0)
    ),
)
values = st.one_of(requests.values, requests.values, huge)
names = st.one_of(
    st.sampled_from(SERVER_OPTIONS), st.sampled_from(SERVER_OPTIONS), st.text()
)
good = st.fixed_dictionaries(
    {},
    optional={
        "budget": st.integers(1, 40).map(lambda blocks: blocks * BLOCK_SIZE),
        "stride": st.integers(1, 40).map(lambda blocks: blocks * BLOCK_SIZE),
        "chunk": st.integers(1, 20).map(lambda blocks: blocks * BLOCK_SIZE),
        "max_budget": st.integers(1, 100).map(lambda blocks: blocks * BLOCK_SIZE),
        "sink": st.integers(0, 100),
        "recent": st.integers(0, 100),
        "allow_full": st.booleans(),
        "shield_ratio": st.floats(0, 1),
    },
)
server_options = st.one_of(
    st.dictionaries(names, values, max_size=4),
    st.tuples(good, st.dictionaries(names, values, max_size=1)).map(
        lambda two: two[0] | two[1]
    ),
    values,
    good,
)
request_arguments = st.one_of(
    requests.arguments,
    requests.sensible.map(
        lambda options: {requests.PREFIX + key: options[key] for key in options}
    ),
    st.dictionaries(
        st.one_of(
            st.sampled_from(requests.OPTIONS).map(lambda name: requests.PREFIX + name),
            st.just(NAMESPACE),
            st.text(max_size=20),
        ),
        values,
        max_size=4,
    ),
    st.integers(0, 5000).map(lambda depth: {NAMESPACE: "[" * depth}),
)


class Doors:
    """The ways in, over one model's configuration."""

    def __init__(self, folder: Path) -> None:
        self._config = folder / "options.yaml"
        options = vars(SERVER) | {"trace": None}
        config = engine_config(
            folder, options, max_num_seqs=4, max_num_batched_tokens=512
        )
        self._vllm_config: VllmConfig = config
        self._processor = InputProcessor(config)
        self._parser = FlexibleArgumentParser(prog="vllm")
        AsyncEngineArgs.add_cli_args(self._parser)

    def request(self, arguments: dict[str, Any]) -> bool:
        """Send a request up to the engine core; return whether it is taken."""
        try:
            body = json.loads(json.dumps({"prompt": [1] * 40, "vllm_xargs": arguments}))
        # what no JSON can hold
        except (RecursionError, ValueError):
            body = {"prompt": [1] * 40, "vllm_xargs": arguments}
        try:
            request = CompletionRequest(**body)
            params = request.to_sampling_params(16)
            prompt: Any = {"type": "token", "prompt_token_ids": body["prompt"]}
            self._processor.process_inputs(
                "id", prompt, params, supported_tasks=("generate",)
            )
        except ValidationError:
            # FastAPI's, with a 400, before anything of ours
            return False
        except Exception as error:
            answer = create_error_response(error)
            assert answer.error.code == 400, repr(error)[:LONGEST_MESSAGE]
            answer.model_dump_json().encode()
            judge(answer.error.message)
            return False
        return True

    def command_line(self, options: Any) -> bool:
        """Give options to `--additional-config`; return whether they are taken."""
        try:
            text = json.dumps({NAMESPACE: options})
        except (RecursionError, ValueError):
            return self._start({NAMESPACE: options})
        return self._parse(["serve", "model", "--additional-config", text])

    def config_file(self, options: Any) -> bool:
        """Give options in a file; return whether they are taken."""
        try:
            text = yaml.safe_dump({"additional-config": {NAMESPACE: options}})
            self._config.write_text(text, encoding="utf-8")
        # what no YAML can hold
        except (RecursionError, ValueError):
            return self._start({NAMESPACE: options})
        return self._parse(["serve", "model", "--config", str(self._config)])

    def _parse(self, words: list[str]) -> bool:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                parsed = self._parser.parse_args(words[2:])
        except SystemExit:
            assert "error: " in said.getvalue()
            return False
        return self._start(parsed.additional_config)

    def _start(self, additional_config: Any) -> bool:
        config = self._vllm_config
        before = config.additional_config
        config.additional_config = additional_config
        try:
            validated_config(config).check_block_size(BLOCK_SIZE)
            row = request_planner(config, BLOCK_SIZE).plan(None, 40).row
        except (ValueError, NotImplementedError) as error:
            assert str(error).startswith("roco: "), repr(error)[:LONGEST_MESSAGE]
            judge(str(error))
            return False
        finally:
            config.additional_config = before
        assert all(0 <= number <= MOST_INTEGER for number in row), row
        return True


def judge(message: str) -> None:
    """Assert that a message can be told, and read."""
    message.encode()
    assert "Traceback" not in message
    assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters"


STRATEGIES: dict[str, Any] = {
    "request": request_arguments,
    "command_line": server_options,
    "config_file": server_options,
}
SHARES = {"request": 0.6, "command_line": 0.3, "config_file": 0.1}


def run(cases: int, number: int) -> tuple[Counter[str], list[str]]:
    """Knock at every door.

    Args:
        cases: How often, at all of them.
        number: Seed of what is given there.

    Returns:
        How often something was taken and refused at each, and what was wrong.
    """
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        doors = Doors(Path(folder))
        for name, strategy in STRATEGIES.items():
            knock = seed(number)(
                settings(
                    max_examples=round(cases * SHARES[name]),
                    deadline=None,
                    database=None,
                    report_multiple_bugs=False,
                    suppress_health_check=[*HealthCheck],
                )(given(strategy)(_counted(name, getattr(doors, name), counts)))
            )
            try:
                knock()
            except Exception as error:
                notes = " ".join(getattr(error, "__notes__", ()))
                faults.append(f"{name}: {error!r:.1000} {notes:.1000}")
    return counts, faults


def _counted(
    name: str, enter: Callable[[Any], bool], counts: Counter[str]
) -> Callable[[Any], None]:
    def knock(given_there: Any) -> None:
        counts[f"{name} {'taken' if enter(given_there) else 'refused'}"] += 1

    return knock


def main() -> int:
    """Run as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak.hostile", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    counts, faults = run(arguments.cases, arguments.seed)
    for fault in faults:
        print(f"FAULT {fault}")
    seconds = time.monotonic() - started
    print(f"{dict(counts)} in {seconds:.0f} s, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
