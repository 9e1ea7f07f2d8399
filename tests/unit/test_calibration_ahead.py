"""Kernels that other processes compile ahead: what they run, and that none is left behind."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from typing import Any

import pytest
import torch

from tierwise.calibration import ahead, compute, precompile


@pytest.mark.parametrize(("cpus", "count"), [(None, 0), (3, 0), (4, 1), (11, 2), (64, 3)])
def test_there_are_as_many_as_the_processors_allow(monkeypatch: pytest.MonkeyPatch, cpus: int | None, count: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    assert ahead.Ahead(wanted=True).count == count
    assert ahead.Ahead(wanted=False).count == 0


def test_they_are_waited_for_and_none_outlives_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    programs = ["raise SystemExit(3)", "import time; time.sleep(600)", ""]
    monkeypatch.setattr(ahead.Ahead, "command", lambda self, which: [sys.executable, "-S", "-c", programs[which]])
    begun = time.monotonic()
    with ahead.Ahead(wanted=True) as compiling:
        # The others have the time of the one that never ends.
        assert compiling.wait(5.0) == [3, None, 0]
    with pytest.raises(KeyboardInterrupt), ahead.Ahead(wanted=True) as compiling:
        raise KeyboardInterrupt
    assert [process.poll() for process in compiling._processes][1] == -9
    assert time.monotonic() - begun < 300
    with ahead.Ahead(wanted=False) as compiling:
        assert compiling.wait(5.0) == []


def test_together_they_run_every_layer_with_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ((32, 64, 2), (64, 160, 4), (96, 128, 4))
    monkeypatch.setattr(compute, "CPU_SIZES", dataclasses.replace(compute.CPU_SIZES, layers=layers, whole=((1, 8), (4, 16))))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran: list[tuple[int, ...]] = []
    step = compute._step

    def seen(forward: Any, leaves: list[Any]) -> None:
        ran.append(tuple(leaves[0].shape))
        step(forward, leaves)

    monkeypatch.setattr(compute, "_step", seen)
    wanted = [(sequences, seq, hidden) for hidden, _, _ in layers for sequences, seq in ((1, 8), (4, 16), (8, 16))]
    for count in (1, 2, 3):
        ran.clear()
        for which in range(count):
            precompile.main(which, count)
        assert sorted(ran) == sorted(wanted), "also twice the largest, where Python cannot keep the device busy with that"
    command = ahead.Ahead(wanted=True).command(1)
    assert command[:3] == [sys.executable, "-m", precompile.__name__]
