"""Memory of this process and of plain AdamW, to compare with what the tiers really took."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_rss_bytes() -> int:
    """The most resident memory that this process has had (VmHWM) since it started or since `reset_peak_rss`."""
    try:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> bool:
    """Starts the peak afresh from what is resident now; False where the system does not allow that."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def plain_adamw_bytes(numel: int) -> int:
    """Bytes of parameters, gradients and optimizer states of plain AdamW: 16 per parameter.

    In fp32: parameter 4, gradient 4, two moments 8. In mixed precision: bf16 parameter and gradient 4, fp32 master weight 4, moments 8.
    Activations come on top.
    """
    if numel < 0:
        raise ValueError(f"numel cannot be negative, got {numel}")
    return 16 * numel


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What each tier took at most, out of `Booster.stats()`. All in bytes."""

    device_peak_bytes: int
    device_budget_bytes: int
    host_peak_bytes: int
    host_budget_bytes: int
    activation_peak_bytes: int | None

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> MemoryUse:
        """Reads the peaks; raises KeyError if `stats` comes from a model that has not been planned yet."""
        activations = stats.get("activation_peak_bytes")
        return cls(
            device_peak_bytes=int(stats["device_peak_bytes"]),
            device_budget_bytes=int(stats["device_budget_bytes"]),
            host_peak_bytes=int(stats["host_peak_bytes"]),
            host_budget_bytes=int(stats["host_budget_bytes"]),
            activation_peak_bytes=None if activations is None else int(activations),
        )
