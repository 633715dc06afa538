# SPDX-License-Identifier: Apache-2.0
"""The demo as a command: its arguments, its errors, and what ends it early."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

from tools.demo import DemoError
from tools.demo.environment import check_packages
from tools.demo.options import parse_options


def main() -> int:
    """Run the demo and return its exit status."""
    options = parse_options(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
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


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    # an exception, so that the server is ended on the way out
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
