"""Gives free memory back in random order, so that what is taken next is a mixture of all of it. Linux.

    python benchmarks/mix_memory.py
    python benchmarks/mix_memory.py --share 0.5 --areas 16

Not all memory of a virtual machine is equally fast, slow pages lie side by side, and what was never touched is slowest. Programs that run
one after the other then get pages of other speeds and cannot be compared. This takes most of the free memory in huge pages, writes it once,
and frees it in shuffled blocks: the kernel hands them out in about that order. `--areas` measures the host's Adam on so many areas, one by
one, before and after.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import statistics
import threading
import time

from tierwise._core import HostBench
from tierwise.config import available_memory_bytes

BLOCK_BYTES = 4 << 20
"""The largest block that Linux's page allocator keeps together on x86-64."""
PIECE_BYTES = 256 << 20
"""What a thread writes at once."""
AREA_NUMEL = 64_000_000
"""Parameters of an area: 0.9 GB."""


def mix(size: int, threads: int, seed: int) -> tuple[float, float]:
    """Takes `size` bytes and frees them in an order that follows from `seed`; gives the seconds of both."""
    begin = time.perf_counter()
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pieces = iter(range(0, size, PIECE_BYTES))
    lock = threading.Lock()

    def write() -> None:
        while True:
            with lock:
                start = next(pieces, None)
            if start is None:
                return
            ctypes.memset(base + start, 1, min(PIECE_BYTES, size - start))

    workers = [threading.Thread(target=write) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    written = time.perf_counter()
    # Whole huge pages: no block begins inside one.
    first = -base % BLOCK_BYTES
    blocks = list(range(first, size - BLOCK_BYTES + 1, BLOCK_BYTES))
    random.Random(seed).shuffle(blocks)
    for start in blocks:
        memory.madvise(mmap.MADV_DONTNEED, start, BLOCK_BYTES)
    # The address that was taken from it keeps it open; the process ends with it.
    return written - begin, time.perf_counter() - written


def spread(areas: int) -> str:
    """How fast the host's Adam is on each of so many areas, all of which exist at once."""
    benches = [HostBench(AREA_NUMEL) for _ in range(areas)]
    rounds = [[bench.rate("adam", 0.05) for bench in benches] for _ in range(2)]
    means = [statistics.mean(pair) for pair in zip(*rounds, strict=True)]
    again = statistics.median(abs(a - b) / statistics.mean((a, b)) for a, b in zip(*rounds, strict=True))
    least, median, most = (value / 1e9 for value in (min(means), statistics.median(means), max(means)))
    return (
        f"Adam on {areas} areas of {14 * AREA_NUMEL / 1e9:.1f} GB, 1e9 parameters/s: {least:.2f} to {most:.2f}, median {median:.2f}, "
        f"standard deviation {100 * statistics.pstdev(means) / statistics.mean(means):.1f} %; the same area twice differs by "
        f"{100 * again:.1f} % (median)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.85, help="of the memory that is available")
    parser.add_argument("--threads", type=int, default=None, help="that write; one per CPU by default")
    parser.add_argument("--areas", type=int, default=0, help="to measure before and after; they take 0.9 GB each")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which blocks are freed")
    a = parser.parse_args()
    if not 0 < a.share <= 0.95:
        raise SystemExit(f"--share is {a.share}: it must be more than 0 and at most 0.95, since other programs need memory too")
    if a.areas < 0 or (a.threads is not None and a.threads < 1):
        raise SystemExit(f"--areas is {a.areas} and --threads {a.threads}: there are no fewer than 0 and 1")
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        raise SystemExit("this needs Linux: huge pages cannot be asked for here")
    size = int(a.share * available_memory_bytes()) // BLOCK_BYTES * BLOCK_BYTES
    if size < 2 * BLOCK_BYTES:
        raise SystemExit(f"--share {a.share} of the available memory is {size} bytes, less than two blocks of {BLOCK_BYTES}")
    if a.areas:
        print(f"before: {spread(a.areas)}", flush=True)
    wrote, freed = mix(size, a.threads or os.cpu_count() or 1, a.seed)
    print(f"mixed {size / 1e9:.1f} GB: written in {wrote:.1f} s, freed in {freed:.1f} s", flush=True)
    if a.areas:
        print(f"after: {spread(a.areas)}", flush=True)


if __name__ == "__main__":
    main()
