# SPDX-License-Identifier: Apache-2.0
"""Write the RULER problems that this folder carries, with lm-eval's own generators.

    pip install "lm-eval[ruler]==0.4.13"
    python -m benchmarks.quality.tasks.make_ruler

lm-eval is needed here alone: the problems travel in `ruler.jsonl.xz`, so that a machine
without lm-eval and without a network can be measured with the same ones.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random

import numpy

from benchmarks.quality.tasks.ruler import PROBLEMS, RULER_TASKS
from tools.smollm2 import smollm2_path

CONTEXTS = (2048,)


def main() -> None:
    from lm_eval.tasks import TaskManager, get_task_dict

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=50_000)
    arguments = parser.parse_args()

    tokenizer = str(smollm2_path())
    with lzma.open(PROBLEMS, "wt", encoding="utf-8", preset=9) as file:
        for name in RULER_TASKS:
            for context in CONTEXTS:
                # the generators draw from the global state
                random.seed(arguments.seed)
                numpy.random.seed(arguments.seed)
                metadata = {"tokenizer": tokenizer, "max_seq_lengths": [context]}
                manager = TaskManager(metadata=metadata)
                task = get_task_dict([_LM_EVAL_NAMES.get(name, name)], manager)
                (task,) = task.values()
                for document in list(task.test_docs())[: arguments.problems]:
                    problem = {
                        "task": name,
                        "context": context,
                        "prompt": task.fewshot_context(
                            document,
                            num_fewshot=0,
                            gen_prefix=task.doc_to_prefix(document),
                        ),
                        "answers": document["outputs"],
                        "max_tokens": task.config.generation_kwargs["max_gen_toks"],
                    }
                    file.write(json.dumps(problem) + "\n")


_LM_EVAL_NAMES = {name: f"ruler_{name}" for name in ("vt", "cwe", "fwe")}


if __name__ == "__main__":
    main()
