"""CPU Adam beside a plain three-stream add and torch's fused CPU AdamW, our copy beside torch's, and steps that may be undone beside plain
ones, at several thread counts, in one run.

    python benchmarks/cpu_adam.py --numel 1000000000 --threads 1,2,4,8,16

Ours steps split bf16 masters: 26 bytes of memory traffic per parameter (gradient 2, parameter 2+2, low half 2+2, two moments 8+8). The add
is `c = a + b` over fp32: 12 bytes per element, the plain bandwidth of the machine. torch steps fp32 parameters with fp32 gradients: 28
bytes per parameter. Copies are of 4 bytes per parameter, `copy_` of fp32 beside ours. A step that may be undone writes a record of 12
bytes per parameter in its own pass, 38 bytes of traffic, and is measured on half of the parameters, with room for the records; "copy +
step" is computed from plain steps and our copy of 12 bytes for each, 50 bytes. All memory is touched before it is timed. What is compared
takes turns; a figure is the median of the repeats, [lowest, highest].
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import statistics
import sys
import time
from collections.abc import Callable

import torch

from tierwise import _core


def in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat, sorted. They take turns, because a shared machine is faster in one moment than in the next; the first call
    of each is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(1 + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat > 0:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(of) for name, of in times.items()}


def allocate(numel: int, dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """Touched memory, in huge pages where the system gives them, for every row alike."""
    memory = mmap.mmap(-1, numel * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=dtype)
    return tensor.zero_() if zero else tensor.fill_(0.01)


def copies(numel: int, threads: int, repeats: int) -> tuple[float, float]:
    """GB/s of bytes copied: ours, which go past the caches, and torch's, in turn."""
    bench = _core.HostBench(numel)
    source, target = allocate(numel, torch.float32), allocate(numel, torch.float32)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(bench.rate("copy", 0.0, threads) / 1e9)
        theirs.append(4 * numel / in_turn({"copy": lambda: target.copy_(source)}, 1)["copy"][0] / 1e9)
    return statistics.median(ours), statistics.median(theirs)


def undoable(numel: int, threads: int, repeats: int) -> tuple[float, float, float]:
    """1e9 parameters/s: plain steps, steps that may be undone, in turn with our copy; and, from plain steps and that copy, a step after one
    of what it overwrites."""
    bench = _core.HostBench(numel)
    found = [[bench.rate(kernel, 0.0, threads) / 1e9 for kernel in ("adam", "undoable", "copy")] for _ in range(repeats)]
    plain, recorded, copied = (statistics.median(of) for of in zip(*found, strict=True))
    return plain, recorded, 1 / (1 / plain + 12 / copied)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--numel", type=int, default=100_000_000, help="parameters, 42 bytes each: 14 of ours, 12 of the add, 16 of torch's")
    p.add_argument("--threads", default="1,2", help="thread counts, comma separated")
    p.add_argument("--repeats", type=int, default=7)
    a = p.parse_args()
    n, counts = a.numel, [int(t) for t in a.threads.split(",")]
    print(f"{n:,} parameters, {a.repeats} repeats")
    print(f"{'threads':>7} {'our copy GB/s':>13} {'torch GB/s':>10} {'ours/torch':>10}")
    for threads in counts:
        torch.set_num_threads(threads)
        copied, torch_copied = copies(n, threads, a.repeats)
        print(f"{threads:7d} {copied:13.1f} {torch_copied:10.1f} {copied / torch_copied:10.2f}", flush=True)
    print(f"{'threads':>7} {'plain 1e9 param/s':>17} {'undoable':>9} {'copy + step':>11} {'undoable/those':>15} {'undoable/plain':>15}")
    for threads in counts:
        plain, recorded, apart = undoable(n, threads, a.repeats)
        print(f"{threads:7d} {plain:17.2f} {recorded:9.2f} {apart:11.2f} {recorded / apart:15.2f} {recorded / plain:15.2f}", flush=True)
    hi, lo, grad = (allocate(n, d) for d in (torch.bfloat16, torch.int16, torch.bfloat16))
    exp_avg, exp_avg_sq = allocate(n, torch.float32, True), allocate(n, torch.float32, True)
    x, y, z = (allocate(n, torch.float32) for _ in range(3))
    param = torch.nn.Parameter(allocate(n, torch.float32))
    param.grad = allocate(n, torch.float32)
    optimizer = torch.optim.AdamW([param], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    step = 0
    print(
        f"{'threads':>7} {'ours 1e9 param/s':>26} {'ours GB/s':>10} {'add GB/s':>9} {'ours/add':>9} "
        f"{'torch 1e9 param/s':>18} {'ours/torch':>10}"
    )
    worst_add, worst_torch = float("inf"), float("inf")
    for threads in counts:
        torch.set_num_threads(threads)

        def ours(threads: int = threads) -> None:
            nonlocal step
            step += 1
            pointers = (t.data_ptr() for t in (hi, lo, exp_avg, exp_avg_sq, grad))
            _core.adam_step("bf16", *pointers, n, (1e-4, 0.9, 0.95, 1e-8, 0.1, True), step, 1.0, threads)

        times = in_turn({"ours": ours, "add": lambda: torch.add(x, y, out=z), "torch": optimizer.step}, a.repeats)
        mine, add, theirs = (statistics.median(times[name]) for name in ("ours", "add", "torch"))
        gbs, add_gbs = 26 * n / mine / 1e9, 12 * n / add / 1e9
        rate, torch_rate = n / mine / 1e9, n / theirs / 1e9
        worst_add, worst_torch = min(worst_add, gbs / add_gbs), min(worst_torch, rate / torch_rate)
        spread = f"{rate:.2f} [{n / times['ours'][-1] / 1e9:.2f}, {n / times['ours'][0] / 1e9:.2f}]"
        print(
            f"{threads:7d} {spread:>26} {gbs:10.1f} {add_gbs:9.1f} {gbs / add_gbs:9.2f} {torch_rate:18.2f} {rate / torch_rate:10.2f}",
            flush=True,
        )
    print(f"lowest ratios: {worst_add:.2f} to the add, {worst_torch:.2f} to torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
