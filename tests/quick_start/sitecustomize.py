# SPDX-License-Identifier: Apache-2.0
"""Python imports this when it starts, in each process that a test starts.

What importing vLLM leaves behind stays for good, and looking through it again and again
is a fifth of the time that it takes. Garbage is still collected, less often.
"""

import gc

gc.set_threshold(100_000, 20, 20)
