"""Kernels that other processes compile ahead: what they run, and that none is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tierwise import cli
from tierwise.calibration import ahead, compute, measure, precompile
from tierwise.kernels.linear_cross_entropy import chunk_tokens


@pytest.mark.parametrize(("cpus", "count"), [(1, 0), (3, 0), (4, 1), (11, 2), (64, 3)])
def test_there_are_as_many_as_the_processors_allow(monkeypatch: pytest.MonkeyPatch, cpus: int, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    assert ahead.Ahead(0, print).count == count
    assert ahead.Ahead(None, print).count == 0


def test_they_are_waited_for_and_none_outlives_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    child = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])"
    programs = ["import sys; sys.exit('first\\nno such kernel')", child, ""]
    monkeypatch.setattr(ahead.Ahead, "command", lambda self, which: [sys.executable, "-S", "-c", programs[which]])
    said: list[str] = []
    begun = time.monotonic()
    with ahead.Ahead(0, said.append) as compiling:
        # The others have the time of the one that never ends.
        assert compiling.wait(5.0) == [1, None, 0]
        groups = [process.pid for process, _ in compiling._started]
    assert said == [
        "a process that compiles ended with 1: no such kernel",
        "a process that compiles took too long: it said nothing",
    ]

    def interrupted() -> None:
        with ahead.Ahead(0, said.append) as compiling:
            groups.extend(process.pid for process, _ in compiling._started)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - begun < 300
    for group in groups:
        # What was started by them is gone too.
        while _lives(group) and time.monotonic() - begun < 300:
            time.sleep(0.01)
        assert not _lives(group)


def _lives(group: int) -> bool:
    """Whether some process of a group is no zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                return True
    return False


def test_no_process_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(ahead.Ahead, "command", lambda self, which: ["/no/such/program"])
    said: list[str] = []
    with ahead.Ahead(0, said.append) as compiling:
        assert compiling.wait(5.0) == []
    assert len(said) == 1
    assert said[0].startswith("no process that compiles: ")
    with ahead.Ahead(None, said.append) as compiling:
        assert compiling.wait(5.0) == []
    assert len(said) == 1


def test_together_they_run_the_loss_and_every_layer_with_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ((32, 64, 2), (64, 160, 4), (96, 128, 4))
    monkeypatch.setattr(compute, "CPU_SIZES", dataclasses.replace(compute.CPU_SIZES, layers=layers, whole=((4, 16), (1, 8))))
    monkeypatch.setattr(compute, "_COMPILED_TOKENS", 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran: list[tuple[int, ...]] = []
    step = compute._step

    def seen(forward: Any, leaves: list[Any]) -> None:
        ran.append(tuple(leaves[0].shape))
        step(forward, leaves)

    monkeypatch.setattr(compute, "_step", seen)
    # Twice the largest of the narrowest too: Python may not keep the device busy with less.
    wanted = [(sequences, 8, hidden) for hidden, _, _ in layers for sequences in (1, 4)] + [(8, 8, 32)]
    loss = (chunk_tokens(torch.Size((compute.CPU_SIZES.vocab, 32)), torch.device("cpu")), 32)
    for count in (1, 2, 3, 5):
        ran.clear()
        for which in range(count):
            begun = len(ran)
            precompile.main(which, count, 0)
            # The first, by one that has no more to compile than others.
            assert (ran[begun] == loss) == (which == count - 1)
            assert len(ran) - begun - (which == count - 1) in (len(wanted) // count, -(-len(wanted) // count))
        assert len(ran) - begun - 1 == len(wanted) // count
        assert sorted(ran) == sorted([*wanted, loss])


@pytest.mark.timeout(120)
def test_the_command_runs() -> None:
    compiling = ahead.Ahead(0, print)
    compiling.count = 1
    ran = subprocess.run(compiling.command(0), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_device_is_known_before_torch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    available = True
    monkeypatch.setattr(measure, "_core", SimpleNamespace(Device=SimpleNamespace(cuda_is_available=lambda: available)))
    usable = True
    cuda = SimpleNamespace(current_device=lambda: 3, is_available=lambda: usable)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert measure._device_index(measure.Options(device="cuda")) == 3
    usable = False
    assert measure._device_index(measure.Options()) is None
    assert measure._device_index(measure.Options(device="emulated")) is None
    monkeypatch.delitem(sys.modules, "torch")
    assert measure._device_index(measure.Options()) == 0
    available = False
    assert measure._device_index(measure.Options()) is None


def test_they_begin_before_torch_is_imported() -> None:
    program = """
import sys
from tierwise.calibration import ahead, measure
def enter(self):
    assert "torch" not in sys.modules, "torch came first"
    raise KeyboardInterrupt("entered")
ahead.Ahead.__enter__ = enter
try:
    measure.calibrate(measure.Options(device="emulated"))
except KeyboardInterrupt as stopped:
    print(stopped)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "entered\n", ran.stderr


def test_what_cannot_work_touches_no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    touched: list[int] = []
    monkeypatch.setattr(measure, "HostBench", touched.append)
    monkeypatch.setattr(measure, "_core", SimpleNamespace(Device=SimpleNamespace(cuda_is_available=lambda: False)))
    with pytest.raises(ValueError, match="device='cuda' but no CUDA device can be used"):
        measure.calibrate(measure.Options(device="cuda"))
    with pytest.raises(ValueError, match="nowhere' is not a directory"):
        measure.calibrate(measure.Options(device="emulated", disk=str(tmp_path / "nowhere")))
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="torch"):
        measure.calibrate(measure.Options(device="emulated"))
    assert touched == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--out", "{none}/m.json"], "is not a directory: make it first"),
        (["--out", "m.json", "--disk", "{none}"], "is not a directory: name one"),
    ],
)
def test_a_wrong_folder_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], says: str
) -> None:
    touched: list[int] = []
    monkeypatch.setattr(measure, "HostBench", touched.append)
    none = str(tmp_path / "none")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["calibrate", "--device", "emulated", *(word.format(none=none) for word in wrong)])
    said = capsys.readouterr().err
    assert (stopped.value.code, touched) == (2, [])
    assert says in said and none in said


def test_nobody_compiles_for_a_device_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(ahead.Ahead, "command", lambda self, which: [sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    with ahead.Ahead(0, print) as compiling:
        processes = [process for process, _ in compiling._started]
        compiling.stop()
        assert len(processes) == 3 and all(process.poll() is not None for process in processes)
        assert compiling.count == 0 and compiling.wait(0.0) == []
