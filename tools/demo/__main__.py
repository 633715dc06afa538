# SPDX-License-Identifier: Apache-2.0
"""The demo as a command: its arguments, its errors, and what ends it early."""

from __future__ import annotations

import importlib.util
import signal
import sys
from importlib import metadata

from tools.demo import DemoError
from tools.demo.options import parse_options

_MODULES = ("vllm", "openai", "transformers", "httpx", "matplotlib", "rich")


def main() -> int:
    """Run the demo and return its exit status."""
    options = parse_options(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGHUP):
        # an exception, so that the server is ended on the way out
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        check_packages()
        # only now is it sure to be importable
        from tools.demo.run import run

        run(options)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped, and nothing is left running", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def check_packages() -> None:
    """Raise unless everything that the demo imports is installed.

    Raises:
        DemoError: Something is missing.
    """
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    try:
        # its entry points are what makes vLLM know the backend
        metadata.version("vllm-roco")
    except metadata.PackageNotFoundError:
        missing.append("vllm-roco")
    if missing:
        raise DemoError(
            f"this Python lacks {', '.join(missing)}. Run pip install -e '.[demo]' "
            "beside an installed vLLM, or unset ROCO_PYTHON for an environment of the "
            "demo's own."
        )


if __name__ == "__main__":
    sys.exit(main())
