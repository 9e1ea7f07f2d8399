"""How fast the directory of the NVMe tier is: as the user says, else as measured at boost."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from typing import TYPE_CHECKING

from tierwise import _core
from tierwise._core import StorageError

if TYPE_CHECKING:
    from tierwise.booster.plugin.gemini import GeminiPlugin

COMMON_READ, COMMON_WRITE = 2.5e9, 2e9
"""Bytes per second of a common NVMe disk that only reads, or only writes: for predictions where there is none to measure."""

_PROBE_BYTES, _PROBE_SECONDS = 2**29, 0.6
"""Bounds of the measurement. A disk may take about as long again for what it has in flight."""


@dataclasses.dataclass(frozen=True)
class DiskSpeeds:
    """Bytes per second of a disk that only reads, or only writes, and where the numbers are from."""

    read_bytes: float
    write_bytes: float
    source: str


def disk_speeds(plugin: GeminiPlugin) -> DiskSpeeds | None:
    """The speeds that the planner weighs, or None without an `nvme_path`; measured once per process and directory.

    Raises ValueError if the directory is kept in memory. A disk that cannot be measured (it is nearly full) counts as a common one.
    """
    if plugin.nvme_path is None:
        return None
    read, write = plugin.nvme_read_bytes_per_second, plugin.nvme_write_bytes_per_second
    if read is not None and write is not None:
        return DiskSpeeds(read, write, "given")
    found = _measured(os.path.realpath(plugin.nvme_path))
    if read is None and write is None:
        return found
    return DiskSpeeds(
        read or found.read_bytes, write or found.write_bytes, f"{'read' if read else 'write'} given, the other {found.source}"
    )


@functools.cache
def _measured(directory: str) -> DiskSpeeds:
    try:
        report = json.loads(_core.probe_disk(directory, _PROBE_BYTES, _PROBE_SECONDS))
    except StorageError as error:
        return DiskSpeeds(COMMON_READ, COMMON_WRITE, f"a common disk's, because this one could not be measured: {error}")
    return DiskSpeeds(report["read_mb_per_s"] * 1e6, report["write_mb_per_s"] * 1e6, "measured")
