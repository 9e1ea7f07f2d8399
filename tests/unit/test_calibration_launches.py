"""Launches are measured with models that leave nothing behind, and with the probe that recordings repeat."""

from __future__ import annotations

import dataclasses
import json
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: install tierwise[train]")

from tierwise.calibration import compute, engine, measure
from tierwise.calibration.thread import LaunchProbe
from tierwise.calibration.timing import Timer


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
    calls: list[int] = []
    once = probe._once

    def counted() -> int:
        calls.append(once())
        return calls[-1]

    monkeypatch.setattr(probe, "_once", counted)
    median = probe.ns(0.0)
    # The first is not counted.
    assert len(calls) == 6
    assert median == sorted(calls[1:])[2]


def test_a_turn_that_was_disturbed_does_not_count() -> None:
    assert engine.median_turn([[3.0, 2.0, 9.0], [20.0, 21.0, 22.0], [2.0, 2.5, 2.0]]) == 3.0


def _timeline(passes: bool) -> str:
    """Three steps of two layers on the host, the first of each undisturbed; and one on the device."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "tid": tid, "args": {"name": name}} for tid, name in enumerate(("host optimizer", "device optimizer"))
    ]
    for step, slowness in enumerate((1.0, 5.0, 1.25)):
        for layer in range(2):
            begin, us = 1e6 * step + 1e5 * layer, 1000.0 * slowness * (1 + layer)
            moved = 1_000_000 * (18 if passes else 26)
            span = {"ph": "X", "tid": 0, "name": f"step layers.{layer}", "ts": begin, "dur": us, "args": {"bytes": moved}}
            events.append(span)
            if passes:
                # The first of a step is disturbed.
                events.append({**span, "name": f"moments layers.{1 - layer}", "ts": begin + 5e5, "dur": us * (10.0, 0.25)[layer]})
        events.append({"ph": "X", "tid": 0, "name": "step lm_head", "ts": 1e6 * step - 10, "dur": 1.0, "args": {"bytes": 26}})
        events.append({"ph": "X", "tid": 1, "name": "step layers.2", "ts": 1e6 * step, "dur": 10.0, "args": {"bytes": 26_000_000}})
        events.append({"ph": "X", "tid": 1, "name": "norm layers.2", "ts": 1e6 * step, "dur": 1.0, "args": {"bytes": 26_000_000}})
    return json.dumps({"traceEvents": events})


@pytest.mark.parametrize("passes", [False, True])
def test_the_engines_adam_is_that_of_undisturbed_chunks(passes: bool) -> None:
    said: list[str] = []
    found = engine.rates(_timeline(passes), said.append)
    assert found.device_params_per_s == pytest.approx(1e11)
    # The middle one of 1e9, 2e8 and 8e8.
    whole, first = (None, pytest.approx(8e8)) if passes else (pytest.approx(8e8), None)
    assert (found.host_params_per_s, found.host_params_first_per_s) == (whole, first)
    # Passes of 2e-3, 10e-3 and 2.5e-3 s times a quarter.
    assert found.host_moments_per_s == (pytest.approx(1.6e9) if passes else None)
    assert found.host_gap_ns is None, "layers are a tenth of a second apart"
    assert said == [f"Adam in the engine: {'two passes' if passes else 'whole steps'} of 3 steps"]
    assert engine.rates(json.dumps({"traceEvents": []}), said.append) == engine.Adam()


def test_the_gap_between_steps_is_that_of_steps_that_wait_for_nothing() -> None:
    spans = [(0.0, 1000.0), (1080.0, 1000.0), (2200.0, 1000.0), (3300.0, 1000.0), (9000.0, 1000.0)]
    events: list[dict[str, Any]] = [{"ph": "M", "tid": 0, "args": {"name": "host optimizer"}}]
    for layer, (begin, us) in enumerate(spans):
        events.append({"ph": "X", "tid": 0, "name": f"step layers.{layer}", "ts": begin, "dur": us, "args": {"bytes": 26_000_000}})
    found = engine.rates(json.dumps({"traceEvents": events}), lambda text: None)
    # 80, 120 and 100 us; the last began 4.7 ms after the one before.
    assert found.host_gap_ns == pytest.approx(1e5)
    # What lies between two steps is no gap.
    for begin in (2081.0, 3201.0):
        events.append({"ph": "X", "tid": 0, "name": "moments layers.0", "ts": begin, "dur": 10.0, "args": {"bytes": 18_000_000}})
    assert engine.rates(json.dumps({"traceEvents": events}), lambda text: None).host_gap_ns == pytest.approx(8e4)


def test_what_speculation_takes_is_read_from_its_spans() -> None:
    events: list[dict[str, Any]] = [{"ph": "M", "tid": 0, "args": {"name": "host optimizer"}}]
    for step, ms in enumerate((2.0, 4.0, 2.5)):
        moved = {"bytes": 38_000_000}
        events.append({"ph": "X", "tid": 0, "name": "speculate layers.3", "ts": 1e6 * step, "dur": 1e3 * ms, "args": moved})
        # Nothing was speculated of it.
        events.append({"ph": "X", "tid": 0, "name": "step embed", "ts": 1e6 * step + 9e4, "dur": 1.0, "args": {"bytes": 26_000_000}})
    found = engine.speculated_rates(json.dumps({"traceEvents": events}))
    assert found.host_undoable_params_per_s == pytest.approx(1_000_000 / 2.5e-3)
    assert found == engine.Adam(host_undoable_params_per_s=found.host_undoable_params_per_s)
    assert engine.speculated_rates(json.dumps({"traceEvents": events[:1]})) == engine.Adam()


def test_layers_are_sustained_from_the_widest_and_enlarged_where_python_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dataclasses.replace(compute.CPU_SIZES, layers=((32, 64, 2), (64, 160, 4)))
    timer = Timer(torch.device("cpu"), 1e-4)
    asked: list[tuple[int, ...]] = []

    def sustained(work: Any, seconds: float) -> float | None:
        x = work.args[1][0]
        asked.append(tuple(x.shape))
        return None if tuple(x.shape) == (4, 64, 32) else 0.5

    monkeypatch.setattr(timer, "sustained", sustained)
    rows = compute.layers(sizes, timer, lambda text: None)
    assert asked == [], "a CPU has no power limit"
    assert {row["sustained_s"] for row in rows} == {None}
    monkeypatch.setattr(compute, "_has_power_limit", lambda device: True)
    rows = compute.layers(sizes, timer, lambda text: None)
    assert asked == [(4, 64, 64), (4, 64, 32), (8, 64, 32)]
    assert [(row["hidden"], row["sequences"]) for row in rows if row["sustained_s"] == 0.5] == [(64, 4), (32, 8)]
    assert len(rows) == 5
