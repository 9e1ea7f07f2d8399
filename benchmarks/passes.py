"""One pass of the host's Adam by size: with the CPUs for itself, and beside processes that compute without a pause, in turns.

    python benchmarks/passes.py --busy 1 --threads 8

A pass that is longer than the CPUs that are left explain waits for threads that get none. The share is the time alone, times all CPUs over
those that the busy processes leave; the last column is the time beside them over that. It may be less than 1: more threads than CPUs get
more than the CPUs that are left, and memory may be the limit. Medians of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from tierwise import _core

_KERNELS = ("adam", "params_first", "moments")
_LOOP = "print(flush=True)\nwhile True: pass"
"""Says that it has begun."""


def measured(benches: list[_core.HostBench], threads: int, seconds: float) -> dict[tuple[str, int], float]:
    """Milliseconds of a pass by kernel and size."""
    found = {}
    for bench in benches:
        for kernel in _KERNELS:
            found[kernel, bench.numel] = 1e3 * bench.numel / bench.rate(kernel, seconds, threads)
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--numel", default="500000,4000000,50000000", help="parameters of a pass, separated by commas")
    p.add_argument("--threads", type=int, default=_core.kernel_threads(), help="kernel threads")
    p.add_argument("--busy", type=int, default=1, help="processes that compute meanwhile")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=0.1, help="of each measurement")
    a = p.parse_args()
    cpus = len(os.sched_getaffinity(0))
    if not 0 < a.busy < cpus:
        raise SystemExit(f"--busy is {a.busy}: at least 1, and less than the {cpus} CPUs of this process")
    if a.threads < 1 or a.rounds < 1 or not 0 < a.seconds <= 60:
        raise SystemExit(
            f"--threads is {a.threads}, --rounds {a.rounds}, --seconds {a.seconds}: at least 1, 1 and more than 0, 60 s at most"
        )
    if not all(numel.isdecimal() and int(numel) > 0 for numel in a.numel.split(",")):
        raise SystemExit(f"--numel is {a.numel}: whole numbers of at least 1, separated by commas")
    benches = [_core.HostBench(int(numel)) for numel in a.numel.split(",")]
    alone, beside = [], []
    for _ in range(a.rounds):
        alone.append(measured(benches, a.threads, a.seconds))
        busy = [subprocess.Popen([sys.executable, "-c", _LOOP], stdout=subprocess.PIPE) for _ in range(a.busy)]
        try:
            for process in busy:
                assert process.stdout is not None
                process.stdout.readline()
            beside.append(measured(benches, a.threads, a.seconds))
        finally:
            for process in busy:
                process.kill()
                process.wait()
    print(f"{a.threads} kernel threads on {cpus} CPUs, {a.busy} busy")
    print(f"{'pass':14}{'parameters':>12}{'alone, ms':>12}{'beside, ms':>12}{'over the share':>16}")
    for kernel, numel in alone[0]:
        before, after = (statistics.median(found[kernel, numel] for found in rounds) for rounds in (alone, beside))
        share = before * cpus / (cpus - a.busy)
        print(f"{kernel:14}{numel:12}{before:12.3f}{after:12.3f}{after / share:16.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
