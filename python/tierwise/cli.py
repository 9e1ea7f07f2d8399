"""The `tierwise` command. Needs no torch; what needs it says so."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from tierwise import __version__
from tierwise.config import parse_bytes
from tierwise.doctor import diagnose


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, 1 if something that was asked for cannot be used, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="tierwise", description="Train models that are bigger than your GPU.")
    parser.add_argument("--version", action="version", version=f"tierwise {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="check this machine: device, memory, disk; say what will be used and why not better")
    doctor.add_argument("--nvme-path", default=None, help="directory to check as the NVMe tier; it is measured with up to --bytes for 6 s")
    doctor.add_argument("--bytes", default="1GiB", help="size of the measurement")
    doctor.add_argument("--format", choices=("table", "json"), default="table")
    args = parser.parse_args(argv)
    try:
        size = parse_bytes(args.bytes, "--bytes")
    except ValueError as error:
        parser.error(str(error))
    report = diagnose(args.nvme_path, size)
    if args.format == "json":
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(report.to_text())
    return 0 if report.usable else 1


if __name__ == "__main__":
    sys.exit(main())
