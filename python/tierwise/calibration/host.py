"""The host alone: our kernels by number of threads. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tierwise import _core
from tierwise._core import HostBench

KERNELS = {
    "adam": "adam_params_per_s",
    "params_first": "params_first_per_s",
    "moments": "moments_per_s",
    "accumulate": "accumulate_numel_per_s",
    "norm": "norm_numel_per_s",
    "copy": "copy_bytes_per_s",
}


def thread_counts(most: int) -> list[int]:
    """Powers of two up to `most`, and `most`."""
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return counts if most in counts else [*counts, most]


def by_threads(bench: HostBench, seconds: float, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Elements per second of every kernel by number of threads; `seconds` in all."""
    counts = thread_counts(_core.kernel_threads())
    share = seconds / (len(counts) * len(KERNELS))
    rows = []
    for threads in counts:
        row: dict[str, Any] = {"threads": threads}
        row |= {field: bench.rate(kernel, share, threads) for kernel, field in KERNELS.items()}
        rows.append(row)
        log(f"{threads} threads: Adam {row['adam_params_per_s'] / 1e9:.2f}e9 parameters/s, copy {row['copy_bytes_per_s'] / 1e9:.1f} GB/s")
    return rows
