"""Compiles the kernels of `compute.layers` and of the loss into Triton's cache on the disk, and the engine's into the driver's, in
processes of their own, while this one measures what needs none of them. Whatever goes wrong there, this process compiles what is missing
itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO

_CPUS_EACH = 4
"""That a process must leave to the training thread, which fills the device's queue meanwhile."""
_MOST = 3
"""More were seen to end no sooner than this process has imported what it needs then, and to hold it up."""
_ENDS_S = 5.0
"""In which a process that was killed is gone, unless the driver holds it."""


class Ahead:
    """Processes that compile for a CUDA device from when this is entered, until all have ended or it is left; none without a device."""

    def __init__(self, device_index: int | None, log: Callable[[str], None]) -> None:
        self.device_index, self.log = device_index, log
        # Those that this process may use.
        cpus = len(os.sched_getaffinity(0))
        self.count = 0 if device_index is None else min(cpus // _CPUS_EACH, _MOST)
        self._started: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []

    def command(self, which: int) -> list[str]:
        """What one of the processes runs: its share of the kernels. Nothing is imported from the working directory."""
        share = [str(which), str(self.count), str(self.device_index)]
        return [sys.executable, "-P", "-m", "tierwise.calibration.precompile", *share]

    def __enter__(self) -> Ahead:
        for which in range(self.count):
            said = tempfile.TemporaryFile()
            null = subprocess.DEVNULL
            try:
                process = subprocess.Popen(self.command(which), stdin=null, stdout=null, stderr=said, start_new_session=True)
            except OSError as error:
                said.close()
                self.log(f"no process that compiles: {error}")
                break
            self._started.append((process, said))
        return self

    def stop(self) -> None:
        """Nobody compiles any more."""
        for process, said in self._started:
            _kill(process)
            said.close()
        self._started, self.count = [], 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def wait(self, seconds: float) -> list[int | None]:
        """How each process ended, after so many seconds at most for all together; None for one that was killed."""
        until = time.monotonic() + seconds
        codes: list[int | None] = []
        for process, said in self._started:
            try:
                codes.append(process.wait(max(until - time.monotonic(), 0.0)))
            except subprocess.TimeoutExpired:
                _kill(process)
                codes.append(None)
            if codes[-1] != 0:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                ended = "took too long" if codes[-1] is None else f"ended with {codes[-1]}"
                self.log(f"a process that compiles {ended}: {lines[-1][:200] if lines else 'it said nothing'}")
        return codes


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The compilers that it has started too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_ENDS_S)
