# SPDX-License-Identifier: Apache-2.0
"""Python imports this when it starts, in each process that a test starts.

What importing vLLM leaves behind stays for good, and looking through it again and again
is a fifth of the time that it takes. Garbage is still collected, less often.

Where vLLM's processes wait for each other they only let others run in between, which
keeps a core busy each. A GPU waits beside them; here they take the cores from the one
that they wait for.
"""

import gc
import os
import sys
import time

gc.set_threshold(100_000, 20, 20)

PAUSE = 1e-4
"""Seconds between two looks."""

os.sched_yield = lambda: time.sleep(PAUSE)

ENGINES = {"vllm", "vllm.entrypoints.cli.main"}
"""Scripts and modules that start engines, whose processes import what these import."""

# behind options, as `-P` is one
program = next((name for name in sys.orig_argv[1:] if not name.startswith("-")), "")
if os.path.basename(program) in ENGINES:
    import nursery

    if nursery.is_possible():
        nursery.import_libraries()
        of_this_process = nursery.branch_off()
        nursery.serve_spawn(lambda: of_this_process)
        nursery.collect_by_itself()
