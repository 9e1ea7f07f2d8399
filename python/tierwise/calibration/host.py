"""The host alone: our kernels by number of threads. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from tierwise import _core
from tierwise._core import HostBench

KERNELS = {
    "adam": "adam_params_per_s",
    "params_first": "params_first_per_s",
    "moments": "moments_per_s",
    "undoable": "undoable_params_per_s",
    "accumulate": "accumulate_numel_per_s",
    "norm": "norm_numel_per_s",
    "copy": "copy_bytes_per_s",
}

_ROUNDS = 3
"""Of all kernels with all threads: the memory of a shared machine is faster in one moment than in the next."""

_COMPARED_TIMES = 6
"""As long as others takes what later measurements are compared with: Adam with all threads."""

_FEW_NUMEL = 100_000_000
_FEW_THREADS_NUMEL = 50_000_000
"""Parameters; 0.7 GB, more than any cache holds."""


def thread_counts(most: int) -> list[int]:
    """Powers of two up to `most`, and `most`."""
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return counts if most in counts else [*counts, most]


def fewer(bench: HostBench, most: int = _FEW_NUMEL) -> HostBench:
    """One of no more than `most` parameters: for what takes long, or is compared with itself."""
    return bench if bench.numel <= most else HostBench(most)


def by_threads(bench: HostBench, seconds: float, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Elements per second of every kernel by number of threads; `seconds` in all."""
    counts = thread_counts(_core.kernel_threads())
    share = seconds / ((len(counts) - 1 + _ROUNDS) * len(KERNELS) + _ROUNDS * (_COMPARED_TIMES - 1))
    rows = []
    few = fewer(bench, _FEW_THREADS_NUMEL) if len(counts) > 1 else bench
    for threads in counts:
        rounds, on = (_ROUNDS, bench) if threads == counts[-1] else (1, few)
        shares = dict.fromkeys(KERNELS, share) | ({"adam": _COMPARED_TIMES * share} if threads == counts[-1] else {})
        found = [{field: on.rate(kernel, shares[kernel], threads) for kernel, field in KERNELS.items()} for _ in range(rounds)]
        row: dict[str, Any] = {"threads": threads}
        row |= {field: statistics.median(of[field] for of in found) for field in KERNELS.values()}
        rows.append(row)
        log(f"{threads} threads: Adam {row['adam_params_per_s'] / 1e9:.2f}e9 parameters/s, copy {row['copy_bytes_per_s'] / 1e9:.1f} GB/s")
    return rows
