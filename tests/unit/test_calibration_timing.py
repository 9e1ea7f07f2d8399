"""Kernels are timed by the device alone, however long Python takes to enqueue them: on a stand-in for CUDA with a clock of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tierwise.calibration import timing

_CYCLES_PER_S = 1.98e9


class _Machine:
    """Python's clock, and when the device's queue is empty."""

    def __init__(self) -> None:
        self.now = 100.0
        self.free = 0.0

    def launch(self, python_s: float, kernel_s: float) -> None:
        self.now += python_s
        self.free = max(self.free, self.now) + kernel_s

    def synchronize(self, device: object = None) -> None:
        self.now = max(self.now, self.free)

    def sleep(self, cycles: int) -> None:
        self.free = max(self.free, self.now) + cycles / _CYCLES_PER_S

    def event(self, enable_timing: bool = False) -> _Event:
        return _Event(self)


class _Event:
    def __init__(self, machine: _Machine) -> None:
        self.machine = machine
        self.at = 0.0

    def record(self) -> None:
        self.at = max(self.machine.free, self.machine.now)

    def elapsed_time(self, other: _Event) -> float:
        return (other.at - self.at) * 1e3

    def query(self) -> bool:
        return self.at <= self.machine.now


class _Cuda:
    type = "cuda"


@pytest.mark.parametrize(("python_s", "kernel_s", "kernels"), [(5e-3, 5e-4, 50), (1e-5, 2e-6, 1), (1e-4, 2e-2, 25), (3e-4, 1e-5, 4)])
def test_launching_is_not_measured(monkeypatch: pytest.MonkeyPatch, python_s: float, kernel_s: float, kernels: int) -> None:
    machine = _Machine()
    rests: list[float] = []

    def rest(seconds: float) -> None:
        rests.append(seconds)
        machine.now += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: machine.now, sleep=rest))
    for name, value in {"Event": machine.event, "synchronize": machine.synchronize, "_sleep": machine.sleep}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        machine.launch(python_s, kernel_s)

    device: Any = _Cuda()
    assert timing.Timer(device, 0.01).seconds_of(work, kernels) == pytest.approx(kernel_s, rel=1e-6)
    # The queue holds what is enqueued while the device sleeps.
    assert calls * kernels <= 1000
    # What is long would meet the power limit without a pause.
    assert rests == ([timing._REST_S] * 3 if kernel_s > 0.01 else [])


def test_one_run_that_is_held_up_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Machine()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: machine.now))
    for name, value in {"Event": machine.event, "synchronize": machine.synchronize, "_sleep": machine.sleep}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    device: Any = _Cuda()
    for held_up in range(4, 12):
        calls = 0

        def work(held_up: int = held_up) -> None:
            nonlocal calls
            calls += 1
            machine.launch(1e-5, 0.2 if calls == held_up else 1e-3)

        assert timing.Timer(device, 0.009).seconds_of(work, 4) == pytest.approx(1e-3, rel=1e-6)
        # Two that are not counted, one that says how many, and three times three.
        assert calls == 12


@pytest.mark.parametrize(("python_s", "kernel_s", "seen"), [(1e-3, 4e-3, True), (4e-3, 3.5e-3, False), (4e-3, 1e-3, False)])
def test_work_that_python_holds_up_is_not_sustained(monkeypatch: pytest.MonkeyPatch, python_s: float, kernel_s: float, seen: bool) -> None:
    machine = _Machine()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: machine.now))
    for name, value in {"Event": machine.event, "synchronize": machine.synchronize, "_sleep": machine.sleep}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    device: Any = _Cuda()
    found = timing.Timer(device, 0.01).sustained(lambda: machine.launch(python_s, kernel_s), 0.6)
    assert found == (pytest.approx(kernel_s, rel=1e-6) if seen else None)
