"""Compiles the kernels of `compute.layers` in processes of their own, into Triton's cache on the disk, while this one measures what needs
none of them. Nothing is lost without it but time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import TracebackType

_CPUS_EACH = 4
"""That a process must leave to the training thread, which fills the device's queue meanwhile."""
_MOST = 3


class Ahead:
    """Processes that compile from when this is entered, until all have ended or it is left."""

    def __init__(self, wanted: bool) -> None:
        self.count = min((os.cpu_count() or 1) // _CPUS_EACH, _MOST) if wanted else 0
        self._processes: list[subprocess.Popen[bytes]] = []

    def command(self, which: int) -> list[str]:
        """What one of the processes runs: its share of the layers."""
        return [sys.executable, "-m", "tierwise.calibration.precompile", str(which), str(self.count)]

    def __enter__(self) -> Ahead:
        null = subprocess.DEVNULL
        self._processes = [subprocess.Popen(self.command(i), stdin=null, stdout=null, stderr=null) for i in range(self.count)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def wait(self, seconds: float) -> list[int | None]:
        """How each process ended, after so many seconds at most; None for one that had to be killed."""
        until = time.monotonic() + seconds
        codes: list[int | None] = []
        for process in self._processes:
            try:
                codes.append(process.wait(max(until - time.monotonic(), 0.0)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes.append(None)
        return codes
