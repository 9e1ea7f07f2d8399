"""Console entry of `tierwise-sim`: the simulator of the Rust core, without torch."""

from __future__ import annotations

import sys

from tierwise import _core


def main() -> int:
    """Runs `tierwise-sim` with the process's arguments.

    Returns the exit code: 0 if the step fits, 3 if it does not, 2 for a usage error, 1 if the result cannot be written.
    """
    return _core.sim_main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
