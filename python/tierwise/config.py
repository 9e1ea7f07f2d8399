"""Budgets as bytes or strings, memory that the machine has left, and default speeds per device. Needs no torch."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(value: int | str, name: str = "size", minimum: int = 1) -> int:
    """Bytes of `value`: an integer, or a string such as "6GiB" (2**30), "700MB" (10**6) or "1.5 GB".

    Raises ValueError for anything else, naming the units that are known, and for less than `minimum` bytes.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{name} must be bytes or a string such as '6GiB', got {value!r}")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{name}={value!r} is not a size; use bytes or a number with one of B, KB, MB, GB, TB, KiB, MiB, GiB, TiB")
        value = int(float(match[1]) * _UNITS[match[2].lower()])
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum} bytes, got {value}")
    return value


def format_bytes(value: float) -> str:
    """A size for people: "1.25 GiB", "37.0 MiB", "512 B"."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f} B"


def available_memory_bytes() -> int:
    """Host memory that can still be taken: MemAvailable, or what the control group leaves if that is less (files that were only read or
    written are given up when memory is asked for, so their pages do not count)."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        for line in Path("/sys/fs/cgroup/memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        if limit != "max":
            available = min(available, max(int(limit) - used, 0))
    except OSError:
        pass
    return available


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Sustained speeds that the planner weighs against each other: FLOP/s, bytes/s, bytes/s, parameters/s, bytes/s, parameters/s."""

    flops: float
    h2d_bytes: float
    d2h_bytes: float
    host_adam_params: float
    device_memory_bytes: float
    host_params_first: float | None = None
    """Of the first pass, where a step writes moments later; None: by its share of the memory traffic."""


_DEVICES = (
    # (part of the device's name, dense 16-bit FLOP/s sustained in training with whole attention counted, H2D and D2H bytes/s with both
    # directions busy, bytes/s of its memory)
    ("H200", 6.8e14, 42e9, 50e9, 3.8e12),
    ("H100", 6.8e14, 42e9, 50e9, 2.6e12),
    ("A100", 2.0e14, 20e9, 22e9, 1.5e12),
    ("L40", 1.2e14, 20e9, 22e9, 6.5e11),
    ("4090", 1.2e14, 20e9, 22e9, 8e11),
    ("3090", 5.0e13, 20e9, 22e9, 7.5e11),
)
_HOST_ADAM_PER_CORE = 3.4e8
_HOST_ADAM_MAX = 3.8e9


def default_speeds(device_name: str, threads: int) -> Speeds:
    """Speeds of a known GPU, else cautious ones; CPU Adam does 3.4e8 parameters/s per core, up to 3.8e9 where DRAM
    is the limit. All of them hold while both directions of the link are busy, which is when a step needs them."""
    adam = min(_HOST_ADAM_PER_CORE * max(threads, 1), _HOST_ADAM_MAX)
    for part, flops, h2d, d2h, memory in _DEVICES:
        if part in device_name:
            return Speeds(flops, h2d, d2h, adam, memory)
    if "emulated" in device_name.lower():
        # A CPU core sustains some 5e10 FLOP/s in bf16 or fp32; the "links" are memory copies.
        return Speeds(5e10 * max(threads, 1), 8e9, 8e9, adam, 8e9)
    return Speeds(5e13, 12e9, 12e9, adam, 5e11)


def unknown_option(name: str, known: Iterable[str], owner: str) -> str:
    """The message for an option that `owner` does not have, with a suggestion."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known options are {', '.join(options)}"
    return f"{owner} has no option {name!r}{hint}"
