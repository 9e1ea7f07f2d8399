"""How long work takes on a device: by its own events, with the queue filled first, so that launching is not measured."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_LEAST, _MOST = 3, 64
_MEANS = 3
_QUEUED_KERNELS = 700
"""So many fit the device's queue; more, and Python would wait for the device after all."""
_SLEEP_CYCLES_PER_S = 2e9
"""At least as fast as any of these devices' clocks."""
_CAUGHT_UP = 0.02
"""Of the calls of sustained work, at which the device may have caught up with Python."""
_LONG_S, _REST_S = 5e-3, 0.06
"""Calls that take so long meet the power limit after a few, which short measurements are not to know of: each waits before it."""
_AMPLE = 1.5
"""Times what Python took to enqueue a call before: the device sleeps so long for each."""


def free(cuda: bool) -> None:
    """Gives back the memory of what nobody refers to any more."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


class Timer:
    """Times work on one device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        self.seconds = seconds
        """Of one measurement, about."""

    def seconds_of(self, work: Callable[[], Any], kernels: int = 1) -> float:
        """Seconds of one call of `work`, which launches about so many kernels: the median of three means, because one may have been held
        up, over as many calls together as fit the time, at least three, after two that are not counted."""
        work()
        enqueue_s = self._enqueue_s(work)
        once = max(self._run(work, 1, enqueue_s), 1e-7)
        times = min(max(int(self.seconds / once), _LEAST), _MOST, max(_QUEUED_KERNELS // kernels, _LEAST))
        means = []
        for _ in range(_MEANS):
            if self.device.type == "cuda" and once > _LONG_S:
                time.sleep(_REST_S)
            means.append(self._run(work, -(-times // _MEANS), enqueue_s))
        return statistics.median(means)

    def _enqueue_s(self, work: Callable[[], Any]) -> float:
        """Seconds that Python takes for one call on an idle device."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _run(self, work: Callable[[], Any], times: int, enqueue_s: float) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(times):
                work()
            return (time.perf_counter() - start) / times
        torch.cuda.synchronize(self.device)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device waits until Python has enqueued the calls: kernels shorter than their launch are then measured too.
        torch.cuda._sleep(int((3e-4 + _AMPLE * times * enqueue_s) * _SLEEP_CYCLES_PER_S))
        start_event.record()
        for _ in range(times):
            work()
        end_event.record()
        torch.cuda.synchronize(self.device)
        return float(start_event.elapsed_time(end_event)) / 1e3 / times

    def sustained(self, work: Callable[[], Any], seconds: float) -> float | None:
        """Seconds of one call of `work` after the device has run it for a while: long work meets the power limit. None on a CPU, and where
        Python does not keep the device busy."""
        if self.device.type != "cuda":
            return None
        once = max(self._run(work, 3, self._enqueue_s(work)), 1e-6)
        torch.cuda.synchronize(self.device)
        marks: list[torch.cuda.Event] = []
        count = max(int(seconds / once), 8)
        warm = count // 3
        caught_up = 0
        for index in range(count):
            work()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
            # What was enqueued two calls before is done: the device is about to wait for Python.
            caught_up += index >= warm and marks[index - 2].query()
            if caught_up > _CAUGHT_UP * (count - warm):
                torch.cuda.synchronize(self.device)
                return None
        torch.cuda.synchronize(self.device)
        return float(marks[warm].elapsed_time(marks[-1])) / 1e3 / (len(marks) - 1 - warm)
