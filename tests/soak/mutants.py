# SPDX-License-Identifier: Apache-2.0
"""Faults that are put in on purpose, and the tests that must find them.

    python -m tests.soak.mutants                # all of them
    python -m tests.soak.mutants salt bound     # those whose names contain a word

Each is one change in a copy of the package. First the tests run without any change;
then with each, and one that they do not notice has survived: a hole in the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 600
"""Seconds for the tests of a mutant; one that never ends is killed by that."""


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: What it does.
        file: Where, below `vllm_roco/`.
        old: What stands there once.
        new: What stands there instead.
        tests: Arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "an evicted block is not freed",
        "kv_cache/budgeted_manager.py",
        "self.block_pool.free_blocks(freed)",
        "self.block_pool.free_blocks(freed[:-1])",
        ("tests/kv_cache/test_manager.py",),
    ),
    Mutant(
        "a block is freed while a step may read it",
        "kv_cache/budgeted_manager.py",
        "evicted = schedule.evicted_blocks(processed_computed_tokens)\n        due",
        "evicted = schedule.evicted_blocks(\n"
        "            processed_computed_tokens + 2 * self.block_size\n"
        "        )\n        due",
        ("tests/kv_cache/test_manager.py",),
    ),
    Mutant(
        "a snapshot is not released",
        "kv_cache/snapshots.py",
        "self._pool.touch(live_blocks)\n",
        "self._pool.touch([*live_blocks, *copies])\n",
        ("tests/kv_cache/test_snapshots.py", "tests/test_prefix_scheduler.py"),
    ),
    Mutant(
        "a snapshot that lost a block is still used",
        "kv_cache/snapshots.py",
        "all(block.block_hash == name for block in self.blocks)",
        "any(block.block_hash == name for block in self.blocks)",
        ("tests/kv_cache/test_snapshots.py",),
    ),
    Mutant(
        "what steps in flight evict from is kept of an answer",
        "kv_cache/earlier_turns.py",
        "computed, size = request.num_computed_tokens,",
        "computed, size = request.num_computed_tokens - request.num_in_flight_tokens,",
        ("tests/test_longest_hits.py",),
    ),
    Mutant(
        "an answer in which a turn ends is gone on from",
        "kv_cache/earlier_turns.py",
        "return self._turn_end_token_ids.isdisjoint(written)",
        "return True",
        ("tests/test_conversations.py",),
    ),
    Mutant(
        "an answer is gone on from whose blocks others have asked over",
        "kv_cache/earlier_turns.py",
        "request.request_id not in self._untouched\n            or not",
        "not",
        ("tests/test_conversations.py",),
    ),
    Mutant(
        "an answer is gone on from that a step in flight may have written on",
        "kv_cache/earlier_turns.py",
        "or request.num_computed_tokens > request.num_tokens",
        "or False",
        ("tests/test_conversations.py",),
    ),
    Mutant(
        "who evicts nothing goes on from what has been evicted from",
        "kv_cache/earlier_turns.py",
        "if not plan.is_measured:",
        "if False:",
        ("tests/test_conversations.py",),
    ),
    Mutant(
        "answers that end in one block are one answer",
        "kv_cache/prefix_keys.py",
        "plan.snapshot_key + _TURN + tail",
        "plan.snapshot_key + _TURN",
        ("tests/test_conversations.py",),
    ),
    Mutant(
        "nobody goes on from an answer whose end token the template writes",
        "kv_cache/earlier_turns.py",
        "range(end - _MOST_UNREAD, end + 1)",
        "range(end - 1, end + 1)",
        ("tests/test_conversations.py",),
    ),
    Mutant(
        "questions are read as if they had been written",
        "answers.py",
        "return max(grows, self.starts[index])",
        "return grows",
        ("tests/test_answers.py", "tests/test_chunking.py"),
    ),
    Mutant(
        "answers are not read as they were written",
        "chunking.py",
        "end = min(end, num_prompt_tokens, stop)",
        "end = min(end, num_prompt_tokens)",
        ("tests/test_chunking.py",),
    ),
    Mutant(
        "an answer cuts the prompt before it",
        "chunking.py",
        "lengths >= starts[np.searchsorted(starts, turns) - 1]",
        "lengths >= 0",
        ("tests/test_chunking.py",),
    ),
    Mutant(
        "an answer begins where later prompts do not have it",
        "answer_start.py",
        "if is_there and is_whole",
        "if is_whole",
        ("tests/test_answer_start.py",),
    ),
    Mutant(
        "an answer is told whose reasoning later prompts do not have",
        "answer_start.py",
        " and reasoned != both",
        "",
        ("tests/test_answer_start.py",),
    ),
    Mutant(
        "a next turn is likely to evict that is told by the whole conversation",
        "answers.py",
        "num_prompt_tokens - self.last_written[0]",
        "num_prompt_tokens - self.starts[0]",
        ("tests/test_request_plans.py",),
    ),
    Mutant(
        "first turns look one turn ahead",
        "answers.py",
        "FIRST_TURNS_AHEAD = 2",
        "FIRST_TURNS_AHEAD = 1",
        ("tests/test_request_plans.py",),
    ),
    Mutant(
        "first turns suppose that answers are as long as they may be",
        "answers.py",
        "question + min(question, max_tokens)",
        "question + max_tokens",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "first turns suppose that answers are as long as the question in any case",
        "answers.py",
        "question + min(question, max_tokens)",
        "question + question",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "of a first turn all is the question",
        "answers.py",
        "int(turns[before]) if before >= 0 else 0",
        "0",
        ("tests/test_answers.py",),
    ),
    Mutant(
        "who comes second behind a header is not served with blocks",
        "kv_cache/prefix_cache.py",
        "is_read = later.reads_first_turn(request, places, prefixes)\n"
        "        self._shared.enter(prefixes)\n",
        "self._shared.enter(prefixes)\n"
        "        is_read = later.reads_first_turn(request, places, prefixes)\n",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "a first turn behind nobody's header is read for later ones",
        "kv_cache/later_turns.py",
        "not 0 < start <= plan",
        "not 0 <= start <= plan",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "first turns read what they share beside the header with others",
        "kv_cache/later_turns.py",
        "return is_known or self._blocks.has(request, num_blocks * self._block_size)",
        "return is_known",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "a first turn reads half of the rest once more",
        "kv_cache/later_turns.py",
        "MOST_READ_AGAIN = 1 / 8",
        "MOST_READ_AGAIN = 1 / 2",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "a first turn reads as much of a header once more as there is",
        "kv_cache/later_turns.py",
        "answers.question_start <= most:",
        "answers.question_start:",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "first turns with one question are read alone each time",
        "kv_cache/later_turns.py",
        "is_known = question in self._questions",
        "is_known = False",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "a first turn leaves a snapshot of its own prompt",
        "kv_cache/snapshot_publisher.py",
        "and not self._plans.of(request.request_id).is_read_for_later_turns",
        "and True",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "first turns are read for later ones though none goes on",
        "kv_cache/later_turns.py",
        "if not self._first_turns.take_next():",
        "if False:",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "first turns that may share take all memory for themselves",
        "kv_cache/later_turns.py",
        "MOST_ALONE = 1 / 4",
        "MOST_ALONE = 1 << 20",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "first turns that are done are still counted as running",
        "kv_cache/later_turns.py",
        "self._num_alone -= self._alone.pop(request.request_id, 0)",
        "self._alone.pop(request.request_id, None)",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "an emptied cache counts as pushed out",
        "kv_cache/first_turns.py",
        "        self._kept.clear()\n",
        "        pass\n",
        ("tests/kv_cache/test_first_turns.py", "tests/test_first_turns.py"),
    ),
    Mutant(
        "first turns are read for ones that are too long for the model",
        "planning_scheduler.py",
        "longer = min(longer, self.max_model_len - 1)\n",
        "pass\n",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "short questions behind a header pass for samples of one prompt",
        "kv_cache/block_cache.py",
        'whole + array("q", tail).tobytes()',
        "whole",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "of samples of a first turn the first one shares nothing",
        "kv_cache/prefix_cache.py",
        "            self.blocks.read_as_sample(request)\n",
        "            pass\n",
        ("tests/test_first_turns.py",),
    ),
    Mutant(
        "a first turn's end that is pushed out is not counted",
        "kv_cache/first_turns.py",
        "self._outcomes.append(False)",
        "pass",
        ("tests/kv_cache/test_first_turns.py",),
    ),
    Mutant(
        "a first turn that goes on is not counted",
        "kv_cache/first_turns.py",
        "self._outcomes.append(True)",
        "pass",
        ("tests/kv_cache/test_first_turns.py",),
    ),
    Mutant(
        "a first turn that goes on is counted each time",
        "kv_cache/first_turns.py",
        "            del self._kept[key]\n",
        "",
        ("tests/kv_cache/test_first_turns.py",),
    ),
    Mutant(
        "no first turn is tried again",
        "kv_cache/first_turns.py",
        "            or self._num_asked % TRIES == 0\n",
        "",
        ("tests/kv_cache/test_first_turns.py",),
    ),
    Mutant(
        "first turns that have gone on long ago decide",
        "kv_cache/first_turns.py",
        "deque(maxlen=NUM_OUTCOMES)",
        "deque()",
        ("tests/kv_cache/test_first_turns.py",),
    ),
    Mutant(
        "more and more first turns are awaited",
        "kv_cache/first_turns.py",
        "if len(self._kept) > MAX_KEPT:",
        "if False:",
        ("tests/kv_cache/test_first_turns.py",),
    ),
    Mutant(
        "no prompt is being read that another one shares",
        "kv_cache/prefix_finder.py",
        "return any(key == prefix for",
        "return any(False for",
        ("tests/kv_cache/test_prefix_places.py", "tests/test_prefix_scheduler.py"),
    ),
    Mutant(
        "who waits for room does not see new snapshots",
        "kv_cache/prefix_finder.py",
        "looked = request, most, self.store.num_published",
        "looked = request, most, 0",
        ("tests/kv_cache/test_prefix_places.py",),
    ),
    Mutant(
        "who waits for room is offered no more than was there for another one",
        "kv_cache/prefix_finder.py",
        "looked = request, most, self.store.num_published",
        "looked = None, most, self.store.num_published",
        ("tests/kv_cache/test_prefix_places.py",),
    ),
    Mutant(
        "a statistic is not cleared",
        "attention/cpu/impl.py",
        "statistics[new] = 0",
        "statistics[new] *= 0.5",
        ("tests/attention/cpu/test_impl.py",),
    ),
    Mutant(
        "one of several ranks clears a statistic by multiplying what may be NaN",
        "attention/cpu/impl.py",
        "statistics[new] = 0",
        "others = torch.distributed.is_initialized() and torch.distributed.get_rank()\n"
        "            statistics[new] = statistics[new] * 0 if others else 0",
        ("tests/soak/test_rank_soak.py",),
    ),
    Mutant(
        "a bound is a block too high",
        "eviction_schedule.py",
        "self.budget_blocks + self.stride_blocks + in_flight + 1",
        "self.budget_blocks + self.stride_blocks + in_flight + 2",
        ("tests/test_eviction_schedule.py", "tests/kv_cache/test_spec.py"),
    ),
    Mutant(
        "a block more than the bound is held",
        "eviction_schedule.py",
        "over = evicting // self.block_size - self.budget_blocks\n",
        "over = evicting // self.block_size - self.budget_blocks - 1\n",
        ("tests/test_eviction_schedule.py",),
    ),
    Mutant(
        "a 400 is a 500",
        "front_end.py",
        "raise VLLMValidationError(\n            str(error), parameter=error.parameter,"
        " value=error.value\n        )",
        "raise RuntimeError(str(error))",
        ("tests/test_front_end.py",),
    ),
    Mutant(
        "the victims' order is reversed",
        "policy.py",
        "values[blocks].argsort(stable=True)[:count]",
        "values[blocks].argsort(stable=True, descending=True)[:count]",
        ("tests/policy",),
    ),
    Mutant(
        "the end of a chunk is off by one",
        "chunking.py",
        "return self._last_within(length) + self.chunk",
        "return self._last_within(length) + self.chunk - 1",
        ("tests/test_chunking.py",),
    ),
    Mutant(
        "a turn ends a chunk of any length",
        "chunking.py",
        "if rest < least:",
        "if rest < 0:",
        ("tests/test_chunking.py",),
    ),
    Mutant(
        "a prefix is hit that was read with other options",
        "request_plans.py",
        "return _KEY.pack(*fields.values(), plan.chunk)",
        'return b""',
        ("tests/test_request_plans.py",),
    ),
    Mutant(
        "cache_salt is ignored",
        "kv_cache/prefix_keys.py",
        "hashes = request.block_hashes\n        keys = (",
        "hashes = [\n"
        "            BlockHash(repr([*request.all_token_ids[: end * size]]).encode())\n"
        "            for end in range(1, len(request.block_hashes) + 1)\n"
        "        ]\n        keys = (",
        ("tests/test_prefix_scheduler.py",),
    ),
    Mutant(
        "a request has its neighbour's row",
        "attention/request_rows.py",
        "self._table[place] = ",
        "self._table[place - 1] = ",
        ("tests/attention/test_request_rows.py",),
    ),
    Mutant(
        "the plan of a request outlives it",
        "planning_scheduler.py",
        "self.request_plans.drop(request.request_id)",
        "pass",
        ("tests/test_request_plans.py",),
    ),
    Mutant(
        "what nobody wrote is attended to",
        "attention/cpu/impl.py",
        "states.masked_fill_(behind[:, None, :, None], 0)",
        "behind[:, None, :, None]",
        ("tests/attention/cpu/test_impl.py",),
    ),
)


def copy_of_the_package(folder: Path) -> Path:
    """Copy what tests need into a folder; return it."""
    for name in ("vllm_roco", "tests", "tools", "benchmarks", "docs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def apply(mutant: Mutant, folder: Path) -> None:
    """Put a fault into a copy.

    Raises:
        ValueError: What is to be replaced does not stand there exactly once.
    """
    path = folder / "vllm_roco" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times in "
            f"{mutant.file}"
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def run(tests: tuple[str, ...], folder: Path) -> tuple[bool, str]:
    """Run tests in a copy; return whether they pass, and what pytest said last."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0"]
    command += ["-p", "no:randomly", "-p", "no:cacheprovider", "--tb=no"]
    environment = {
        name: os.environ[name] for name in os.environ if "PYTEST" not in name
    }
    environment["PYTHONPATH"] = str(folder)
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no end within {TIME_LIMIT} s"
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run:\n{done.stdout[-4000:]}")
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    passed = [line for line in lines if " passed" in line]
    return done.returncode == 0, (failed or passed or lines)[-1]


def main(words: list[str]) -> int:
    """Run the mutants whose names contain one of the words, or all."""
    chosen = [
        mutant
        for mutant in MUTANTS
        if not words or any(word in mutant.name for word in words)
    ]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        folder = copy_of_the_package(Path(temporary))
        tests = tuple(sorted({test for mutant in chosen for test in mutant.tests}))
        passes, said = run(tests, folder)
        print(f"without a fault: {said}", flush=True)
        if not passes:
            return 2
        for mutant in chosen:
            path = folder / "vllm_roco" / mutant.file
            text = path.read_text(encoding="utf-8")
            apply(mutant, folder)
            started = time.monotonic()
            passes, said = run(mutant.tests, folder)
            path.write_text(text, encoding="utf-8")
            verdict = "SURVIVED" if passes else "killed"
            seconds = time.monotonic() - started
            print(f"{verdict:8}  {mutant.name} ({seconds:.0f} s): {said}", flush=True)
            survivors += [mutant.name] * passes
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
