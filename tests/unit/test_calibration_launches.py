"""Launches are measured with models that leave nothing behind, and with the probe that recordings repeat."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: install tierwise[train]")

from tierwise.calibration import engine
from tierwise.calibration.thread import LaunchProbe


def test_models_are_gone_before_the_next_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, Any]] = []
    boosted = engine._boosted

    def counted(device: torch.device, layers: int, size: tuple[int, int, int], recompute: str, offload_optim_frac: float = 0.0) -> Any:
        assert [how for how, model in made if how != recompute and model() is not None] == []
        booster, model, optimizer = boosted(device, layers, size, recompute, offload_optim_frac)
        made.append((recompute, weakref.ref(model)))
        return booster, model, optimizer

    monkeypatch.setattr(engine, "_boosted", counted)
    monkeypatch.setattr(engine, "_ROUNDS", 1)
    monkeypatch.setattr(engine, "_PROBE_S", 0.01)
    measured = engine.launches(torch.device("cpu"))
    assert [how for how, _ in made] == ["none", "none", "full", "full"]
    assert all(ns > 0 for ns in measured.values())


def test_the_probe_takes_as_long_as_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = LaunchProbe(torch.device("cpu"))
    calls = []
    once = probe._once
    monkeypatch.setattr(probe, "_once", lambda: calls.append(once()) or calls[-1])  # type: ignore[func-returns-value]
    median = probe.ns(0.0)
    # The first is not counted.
    assert len(calls) == 6
    assert median == sorted(calls[1:])[2]
