"""Launches are measured with models that leave nothing behind, and with the probe that recordings repeat."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: install tierwise[train]")

from tierwise.calibration import engine, measure
from tierwise.calibration.thread import LaunchProbe


def test_launches_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    boosted = engine._boosted

    def counted(*args: Any) -> Any:
        booster, model, optimizer = boosted(*args)
        made.append(weakref.ref(model))
        return booster, model, optimizer

    monkeypatch.setattr(engine, "_boosted", counted)
    monkeypatch.setattr(engine, "_ROUNDS", 1)
    monkeypatch.setattr(engine, "_PROBE_S", 0.01)
    with measure._Sections(cuda=False)("launches"):
        measured = engine.launches(torch.device("cpu"))
    assert [model() for model in made] == [None] * 3
    assert all(ns > 0 for ns in measured.values())


def test_what_launches_take_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many, again = ({"forward": 1000.0 + per * layers, "backward": 500.0 + 2 * per * layers, "step": 7.0} for layers, per in
                        ((engine._FEW, 10), (engine._MANY, 10), (engine._MANY, 13)))  # fmt: skip
    monkeypatch.setattr(engine, "_step_ns", lambda device, models, probes: probes.extend([3.0, 5.0, 4.0]) or [few, many, again])
    assert engine.launches(torch.device("cpu")) == {
        "forward_ns": 10, "backward_ns": 20, "checkpointed_forward_ns": 13, "checkpointed_backward_ns": 26,
        "outside_forward_ns": 1000, "outside_backward_ns": 500, "step_ns": 7, "probe_ns": 4,
    }  # fmt: skip


def test_the_probe_takes_as_long_as_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = LaunchProbe(torch.device("cpu"))
    calls = []
    once = probe._once
    monkeypatch.setattr(probe, "_once", lambda: calls.append(once()) or calls[-1])  # type: ignore[func-returns-value]
    median = probe.ns(0.0)
    # The first is not counted.
    assert len(calls) == 6
    assert median == sorted(calls[1:])[2]
