"""How fast a training thread goes through Python, torch and the driver: a fixed piece of its work."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

_LAYERS, _WIDTH = 48, 64
"""About 300 kernels of a microsecond each; other numbers would make other probes, which must not be compared."""
_LEAST = 5
"""Times that are timed at least."""


class LaunchProbe:
    """Forward and backward of many small layers, which the device finishes sooner than they are enqueued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with device:
            self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(_WIDTH, _WIDTH, bias=False), nn.SiLU()) for _ in range(_LAYERS)))
            self.input = torch.ones(_WIDTH, _WIDTH)
        self.parameters = list(self.layers.parameters())

    def ns(self, seconds: float) -> float:
        """Nanoseconds in which a training thread enqueues it once: the median of as many times as fit `seconds`, at least five."""
        times: list[int] = []
        until = time.perf_counter() + seconds
        self._once()
        while len(times) < _LEAST or time.perf_counter() < until:
            times.append(self._once())
        return statistics.median(times)

    def _once(self) -> int:
        start = time.perf_counter_ns()
        torch.autograd.grad(self.layers(self.input).sum(), self.parameters)
        ns = time.perf_counter_ns() - start
        if self.device.type == "cuda":
            # A full queue would make the next one wait.
            torch.cuda.synchronize(self.device)
        return ns
