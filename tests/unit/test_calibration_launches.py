"""Launches are measured with models that leave nothing behind, and with the probe that recordings repeat."""

from __future__ import annotations

import dataclasses
import json
import time
import weakref
from types import SimpleNamespace
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


def test_turns_are_compared_by_the_probes_around_them() -> None:
    # Two models: turns of the first after the probes 0, 2 and 4, of the second after 1, 3 and 5. The third turn met slower processors, as
    # the probes say; the first model's second one was disturbed where no probe saw it.
    probes = [4.0, 4.0, 4.0, 4.0, 8.0, 8.0, 8.0]
    assert engine.as_probed([[3.0, 2.0, 9.0], [20.0, 21.0, 22.0], [5.0, 6.0, 7.0]], probes, [0, 2, 4]) == 4.0 * 0.75
    assert engine.as_probed([[4.0], [9.0], [12.0]], probes, [1, 3, 5]) == 4.0 * 1.5


def test_launches_of_a_machine_that_slows_down_are_those_of_one_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"ns": 0, "factor": 1}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["ns"] / 1e9)

    class Probe:
        turns = 0

        def __init__(self, device: torch.device) -> None:
            pass

        def ns(self, seconds: float) -> float:
            # From the last turn of the second round on everything takes twice as long.
            clock["factor"] = 1 if Probe.turns < 5 else 2
            Probe.turns += 1
            return 100.0 * clock["factor"]

    class Trained:
        """Its forward takes so long, its backward twice that, its step a tenth."""

        def __init__(self, ns: int) -> None:
            self.of = ns
            self.loss = None

        def takes(self, ns: int) -> None:
            clock["ns"] += ns * clock["factor"]

        def __call__(self, **inputs: Any) -> Trained:
            self.takes(self.of)
            return self

        def backward(self, loss: Any, optimizer: Any) -> None:
            self.takes(2 * self.of)

        def step(self) -> None:
            self.takes(self.of // 10)

        def zero_grad(self) -> None:
            pass

        flush = zero_grad

    def boosted(device: torch.device, layers: int, size: Any, tokens: int, recompute: str) -> tuple[Trained, Trained, Trained]:
        of = Trained(1000 + layers * (100 if recompute == "none" else 150))
        return of, of, of

    monkeypatch.setattr(engine, "LaunchProbe", Probe)
    monkeypatch.setattr(engine, "_boosted", boosted)
    found = engine.launches(torch.device("cpu"))
    # As with the slower processors, which the median probe met.
    assert found == {
        "forward_ns": 200, "backward_ns": 400, "checkpointed_forward_ns": 300, "checkpointed_backward_ns": 600,
        "outside_forward_ns": 2000, "outside_backward_ns": 4000, "step_ns": 520, "probe_ns": 200,
    }  # fmt: skip


def test_what_follows_each_other_has_one_probe_between() -> None:
    rates = iter([10.0, 20.0, 40.0, 80.0, 160.0])
    asked: list[str] = []

    def rate(kernel: str, seconds: float) -> float:
        asked.append(kernel)
        return next(rates)

    probe = engine.HostProbe(SimpleNamespace(rate=rate))  # type: ignore[arg-type]
    first = engine.Adam(host_moments_per_s=1.0)
    assert probe.around(lambda: first) == (first, 15.0)
    assert probe.around(engine.Adam) == (engine.Adam(), 30.0)
    assert asked == ["adam"] * 3

    def fails() -> engine.Adam:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        probe.around(fails)
    # How fast it was before something that failed says nothing any more.
    assert probe.around(engine.Adam) == (engine.Adam(), 120.0)


class _Events:
    """A timeline that is written down span by span."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.tracks: list[str] = []

    def span(self, track: str, name: str, begin_ms: float, ms: float, moved: int = 0) -> None:
        if track not in self.tracks:
            self.tracks.append(track)
            self.events.append({"ph": "M", "tid": self.tracks.index(track), "args": {"name": track}})
        tid = self.tracks.index(track)
        self.events.append({"ph": "X", "tid": tid, "name": name, "ts": 1e3 * begin_ms, "dur": 1e3 * ms, "args": {"bytes": moved}})

    def text(self) -> str:
        return json.dumps({"traceEvents": self.events})


_HALF = engine.Beside(whole=0.5, first=0.5, moments=0.8)


@pytest.mark.parametrize("passes", [False, True])
def test_the_engines_steps_are_as_fast_as_if_nothing_were_copied(passes: bool) -> None:
    events, moved = _Events(), 1_000_000 * (18 if passes else 26)
    for step, slowness in enumerate((1.0, 5.0, 1.25)):
        begin = 1000.0 * step
        events.span("host optimizer", "step layers.0", begin, 2.0 * slowness, moved)
        events.span("host optimizer", "step model.norm", begin + 40, 1.0, 26)
        # Beside a copy all the time, and for half of it.
        events.span("host optimizer", "step layers.1", begin + 50, 4.0 * slowness, moved)
        events.span("h2d", "refresh layers.0", begin + 50, 4.0 * slowness)
        events.span("host optimizer", "step layers.2", begin + 100, (8 / 3) * slowness, moved)
        events.span("h2d", "refresh layers.1", begin + 100 + (4 / 3) * slowness, (4 / 3) * slowness)
        # What gradients, or their norms, are in the way of counts for nothing.
        events.span("host optimizer", "step layers.3", begin + 150, 90.0, moved)
        events.span("d2h", "gradients layers.4", begin + 200, 5.0)
        if passes:
            events.span("host optimizer", "moments layers.0", begin + 300, 1.0 * slowness, moved)
            events.span("host optimizer", "moments layers.1", begin + 310, 1.25 * slowness, moved)
            events.span("d2h", "gradients layers.1", begin + 310, 1.25 * slowness)
            events.span("host optimizer", "moments layers.2", begin + 320, 70.0, moved)
            events.span("host norm", "norm layers.1", begin + 325, 1.0)
    said: list[str] = []
    found = engine.rates(events.text(), _HALF, said.append)
    # The middle one of 5e8, 1e8 and 4e8, and of 1e9, 2e8 and 8e8.
    whole, first = (None, pytest.approx(4e8)) if passes else (pytest.approx(4e8), None)
    assert (found.host_params_per_s, found.host_params_first_per_s) == (whole, first)
    assert found.host_moments_per_s == (pytest.approx(8e8) if passes else None)
    assert found.host_gap_ns is None, "no step follows another at once"
    kind, late = ("first passes", 6) if passes else ("whole steps", 0)
    assert said == [f"Adam in the engine: 9 {kind}, {late} second passes; 0.00 ms of a step are not its bytes', from 0 of a head"]
    assert engine.rates(_Events().text(), _HALF, said.append) == engine.Adam()


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize(
    ("head_ms", "numel", "steps", "fixed_ms"),
    [
        pytest.param(1.4, 1_000_000, 6, 0.2, id="fixed"),
        pytest.param(1.0, 1_000_000, 6, 0.0, id="faster per byte"),
        pytest.param(1.4, 1_300_000, 6, 0.0, id="too large"),
        pytest.param(1.4, 1_000_000, 5, 0.0, id="too few"),
        pytest.param(9.0, 1_000_000, 6, 2.5, id="all delay"),
    ],
)
def test_what_a_step_takes_beside_its_bytes_is_read_from_a_smaller_one(
    passes: bool, head_ms: float, numel: int, steps: int, fixed_ms: float
) -> None:
    events, moved = _Events(), 18 if passes else 26
    for step in range(steps):
        begin = 1000.0 * step
        # 4 million parameters in 5 ms; of the head's time a copy takes half.
        events.span("host optimizer", "step layers.0", begin, 5.0, moved * 4_000_000)
        events.span("host optimizer", "step layers.1", begin + 5.1, 5.0, moved * 4_000_000)
        events.span("host optimizer", "step lm_head", begin + 20, 2 * head_ms, moved * numel)
        events.span("h2d", "refresh layers.1", begin + 20, 2 * head_ms)
        # Heads that gradients or norms are in the way of say nothing.
        for place, track in enumerate(("d2h", "host norm")):
            events.span("host optimizer", "step lm_head", begin + 100 * (1 + place), 50.0, moved * numel)
            events.span(track, "lm_head", begin + 100 * (1 + place), 20.0)
        if passes:
            events.span("host optimizer", "moments layers.0", begin + 400, 1.0, moved)
    found = engine.rates(events.text(), _HALF, lambda text: None)
    rate = found.host_params_first_per_s if passes else found.host_params_per_s
    assert rate is not None and found.host_gap_ns is not None
    assert found.host_fixed_ns == pytest.approx(1e6 * fixed_ms)
    assert found.host_gap_ns == pytest.approx(1e6 * fixed_ms + 1e5)
    # Together they are what was measured.
    assert 4e9 / rate + fixed_ms == pytest.approx(5.0)


def test_what_copies_leave_of_a_pass_is_read_from_what_was_measured_together() -> None:
    def row(*actors: str, **figures: float) -> dict[str, Any]:
        return {"actors": list(actors), **figures}

    sharing = [
        row("h2d"),
        row("adam", adam_params_per_s=4.0, params_first_per_s=8.0, moments_per_s=10.0),
        row("h2d", "adam", adam_params_per_s=3.0, params_first_per_s=9.0),
        row("d2h", "adam", adam_params_per_s=2.0, moments_per_s=6.0),
        row("adam", "compute", adam_params_per_s=4.0, params_first_per_s=8.0, moments_per_s=10.0),
        row("h2d", "adam", "compute", adam_params_per_s=2.0, params_first_per_s=9.0),
        row("d2h", "adam", "compute", adam_params_per_s=1.0, moments_per_s=2.0),
    ]
    assert engine.Beside.of(sharing, apart=False) == engine.Beside(whole=0.75, first=1.0, moments=0.6)
    assert engine.Beside.of(sharing, apart=True) == engine.Beside(whole=0.625, first=1.0, moments=0.4)


def test_the_gap_between_steps_is_that_of_steps_that_wait_for_nothing() -> None:
    spans = [(0.0, 1000.0), (1080.0, 1000.0), (2200.0, 1000.0), (3300.0, 1000.0), (9000.0, 1000.0)]
    events: list[dict[str, Any]] = [{"ph": "M", "tid": 0, "args": {"name": "host optimizer"}}]
    for layer, (begin, us) in enumerate(spans):
        events.append({"ph": "X", "tid": 0, "name": f"step layers.{layer}", "ts": begin, "dur": us, "args": {"bytes": 26_000_000}})
    found = engine.rates(json.dumps({"traceEvents": events}), _HALF, lambda text: None)
    # 80, 120 and 100 us; the last began 4.7 ms after the one before.
    assert found.host_gap_ns == pytest.approx(1e5)
    # What lies between two steps is no gap.
    for begin in (2081.0, 3201.0):
        events.append({"ph": "X", "tid": 0, "name": "moments layers.0", "ts": begin, "dur": 10.0, "args": {"bytes": 18_000_000}})
    assert engine.rates(json.dumps({"traceEvents": events}), _HALF, lambda text: None).host_gap_ns == pytest.approx(8e4)


def test_what_speculation_and_the_device_take_is_read_from_their_spans() -> None:
    events = _Events()
    for step, ms in enumerate((2.0, 4.0, 2.5)):
        events.span("host optimizer", "speculate layers.3", 1e3 * step, ms, 38_000_000)
        # Nothing was speculated of it.
        events.span("host optimizer", "step embed", 1e3 * step + 90, 0.001, 26_000_000)
        # Only after the last step nothing is computed beside it.
        for layer, us in enumerate((10.0, 20.0, 40.0)):
            events.span("device optimizer", f"step layers.{layer}", 1e3 * step + 10 * layer, us / 1e3 * (3 - step), 26_000_000)
        events.span("device optimizer", "norm layers.2", 1e3 * step + 50, 0.001, 26_000_000)
    found = engine.speculated_rates(events.text(), 0.0)
    assert found.host_undoable_params_per_s == pytest.approx(1_000_000 / 2.5e-3)
    assert found.device_params_per_s == pytest.approx(5e10)
    assert found == engine.Adam(host_undoable_params_per_s=found.host_undoable_params_per_s, device_params_per_s=found.device_params_per_s)
    # But for what each takes beside its bytes.
    assert engine.speculated_rates(events.text(), 0.5e6).host_undoable_params_per_s == pytest.approx(1_000_000 / 2.0e-3)
    assert engine.speculated_rates(_Events().text(), 0.0) == engine.Adam()


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
