"""The `tierwise` command. Needs no torch; what needs it says so."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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
    calibrate = commands.add_parser("calibrate", help="measure this machine in a minute and write a hardware file for tierwise-sim")
    calibrate.add_argument("--out", required=True, help="file to write, for `tierwise-sim run --hardware FILE`")
    calibrate.add_argument("--name", default="this-machine", help="name of the machine in reports")
    calibrate.add_argument("--device", choices=("auto", "cuda", "emulated"), default="auto", help="emulated: the CPU stands for the device")
    calibrate.add_argument("--disk", default=None, help="directory to measure as the NVMe tier")
    calibrate.add_argument("--host-numel", type=int, help="parameters to measure the host on, 14 bytes each (400 million if memory allows)")
    calibrate.add_argument("--seconds", type=float, default=45.0, help="all measurements together, about")
    args = parser.parse_args(argv)
    return _doctor(parser, args) if args.command == "doctor" else _calibrate(parser, args)


def _doctor(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
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


def _calibrate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from tierwise.calibration import Options, calibrate
    from tierwise.calibration.measure import write

    try:
        options = Options(name=args.name, device=args.device, disk=args.disk, host_numel=args.host_numel, seconds=args.seconds)
        if not Path(args.out).parent.is_dir():
            raise ValueError(f"--out {args.out}: {Path(args.out).parent} is not a directory: make it first")
        begun = time.monotonic()
        found = calibrate(options, lambda text: print(f"{time.monotonic() - begun:5.1f} s: {text}", file=sys.stderr, flush=True))
        write(args.out, found)
    except ValueError as error:
        parser.error(str(error))
    except ImportError as error:
        print(f"error: {error}; `tierwise-sim calibrate` measures the host without torch", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
