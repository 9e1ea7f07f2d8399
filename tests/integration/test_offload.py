"""Activations kept, recomputed or in host memory: the same bits, less device memory, and waits only where the link is too slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.timelines import Tracks, record, slow_down
from tierwise import BudgetError
from tierwise.booster.plugin import GeminiPlugin

# Large enough for tensors that are worth a copy.
SIZE = {"rows": 8, "seq": 32}
LAYERS = 5
KEPT = {"recompute": "none", "offload_activations": "none"}
OFFLOADED = {"recompute": "none", "offload_activations": "full"}
STATIC_HOST = {"placement_policy": "static", "offload_optim_frac": 1.0}
SLOW = {"h2d_bytes_per_second": 3e8, "d2h_bytes_per_second": 3e8}
VARIANTS: dict[str, dict[str, Any]] = {
    "recomputed": {"recompute": "full"},
    "offloaded": OFFLOADED,
    "offloaded, slow links": {**OFFLOADED, **SLOW},
    "offloaded, slow out": {**OFFLOADED, "d2h_bytes_per_second": 1e8},
    "offloaded, slow in": {**OFFLOADED, "h2d_bytes_per_second": 1e8},
    "offloaded, host optimizer": {**OFFLOADED, **STATIC_HOST},
    "offloaded, streamed": {**OFFLOADED, **STATIC_HOST, "offload_param_frac": 1.0},
    "offloaded, streamed, slow": {**OFFLOADED, **STATIC_HOST, **SLOW, "offload_param_frac": 1.0},
}


def model(kit: Any) -> Any:
    return kit.llama(layers=LAYERS)


def tightest(kit: Any, **options: Any) -> int:
    least = kit.tightest(lambda: model(kit), micro_batch_size=SIZE["rows"], seq_len=SIZE["seq"], **options)
    assert isinstance(least, int)
    return least


@pytest.mark.parametrize(("precision", "accumulation"), [("fp32", 1), ("bf16", 3)])
def test_how_activations_are_kept_changes_no_bit(kit: Any, precision: str, accumulation: int) -> None:
    options = {**SIZE, "steps": 3, "precision": precision, "gradient_accumulation_steps": accumulation, "max_norm": 0.5}
    kept = kit.train(model(kit), **options, **KEPT)
    assert kept.booster.stats()["activation_out_bytes"] == 0
    variants = dict(VARIANTS)
    planned = {"precision": precision, "gradient_accumulation_steps": accumulation, "max_norm": 0.5}
    # Offloading down to the last byte that the plan leaves, whatever the links do.
    least = tightest(kit, **planned, **OFFLOADED)
    variants["offloaded, tightest"] = {**OFFLOADED, "device_budget": least}
    variants["offloaded, tightest, slow"] = {**OFFLOADED, **SLOW, "device_budget": least}
    variants["as planned, tightest"] = {"device_budget": tightest(kit, **planned)}
    for name, variant in variants.items():
        result = kit.train(model(kit), **options, **variant)
        stats = result.booster.stats()
        result.same_as(kept)
        assert stats["device_peak_bytes"] <= stats["device_budget_bytes"], name
        assert stats["host_peak_bytes"] <= stats["host_budget_bytes"], name
        assert stats["offload_kept_bytes"] == 0, name
        assert stats["host_activation_bytes"] == 0, name
        if name.startswith("offloaded"):
            plan = result.booster._runtime.planned.plan
            assert stats["offloaded_units"] == plan["activations"].count("offload") == LAYERS, name
            assert 0 < stats["activation_in_bytes"] <= stats["activation_out_bytes"], name
            assert 0 < stats["host_activation_peak_bytes"] <= plan["host"]["activations"], name


def test_the_device_holds_less(kit: Any) -> None:
    # Gradients and states elsewhere, so that activations are what is left.
    options = {**SIZE, **STATIC_HOST, "steps": 2, "precision": "fp32", "offload_param_frac": 1.0}
    peaks = {}
    for name, how in (("kept", KEPT), ("offloaded", OFFLOADED)):
        stats = kit.train(model(kit), **options, **how).booster.stats()
        peaks[name] = stats["activation_peak_bytes"]
        if name == "offloaded":
            assert stats["device_activations_bytes"] == 0
    runtime = kit.boosted(model(kit), micro_batch_size=8, seq_len=32, precision="fp32", **OFFLOADED)[0]._runtime
    layers = [unit.offload_bytes for unit in runtime.trace.units if unit.offload_bytes > 0][:LAYERS]
    # All layers but the two of the window are away at the turn.
    assert peaks["offloaded"] <= peaks["kept"] - sum(layers) + runtime.planned.plan["offload_window_bytes"]
    assert peaks["offloaded"] < peaks["kept"] * 0.6


def test_a_budget_that_only_offloading_fits(kit: Any) -> None:
    options: dict[str, Any] = {"precision": "bf16", "micro_batch_size": 8, "seq_len": 32, "recompute": "none"}
    least = tightest(kit, precision="bf16", **OFFLOADED)
    with pytest.raises(BudgetError, match=r"offload_activations='auto'"):
        kit.boosted(model(kit), **options, offload_activations="none", device_budget=least)
    booster, *_ = kit.boosted(model(kit), **options, device_budget=least)
    explained = booster.explain()
    assert "5 layers: 0 kept, 0 recomputed in backward, 5 offloaded to the host" in explained
    assert "simulated step: " in explained
    # The host's region is part of the host's budget.
    host = booster._runtime.planned.plan["host"]
    assert host["activations"] > 0
    with pytest.raises(BudgetError, match="more host memory") as caught:
        kit.boosted(model(kit), **options, device_budget=least, host_budget=sum(host.values()) - 1)
    assert caught.value.breakdown["activations"] == host["activations"]


def test_both_in_full_is_a_contradiction() -> None:
    with pytest.raises(ValueError, match="recompute='full' leaves no activations"):
        GeminiPlugin(recompute="full", offload_activations="full")
    with pytest.raises(ValueError, match="offload_activations='all' is not one of"):
        GeminiPlugin(offload_activations="all")  # type: ignore[arg-type]


def timeline(kit: Any, path: Path, seconds: float, **options: Any) -> Tracks:
    """Spans of the second step, with layers that take `seconds` in each direction."""
    net = model(kit)
    slow_down(net.model.layers, seconds)
    booster, net, optimizer = kit.boosted(net, precision="fp32", micro_batch_size=8, seq_len=32, **OFFLOADED, **options)
    return record(booster, net, optimizer, kit.batches(2, 8, 32), path)


def test_a_fast_link_is_never_waited_for(kit: Any, tmp_path: Path) -> None:
    tracks = timeline(kit, tmp_path / "timeline.json", seconds=0.06)
    # Nothing computes between the last layer's forward and its backward: what it saved has not left by then, or only just.
    last = f"model.layers.{LAYERS - 1}"
    assert not [span.name for span in tracks.maybe("compute wait") if "activations" in span.name and last not in span.name]
    for layer in range(LAYERS):
        unit = f"model.layers.{layer}"
        forward, backward = (tracks.first("compute", f"{unit} {phase}") for phase in ("forward", "backward"))
        out = tracks.of("d2h", f"activations {unit}")
        assert all(span.start >= forward.start for span in out)
        back = tracks.maybe("h2d", f"activations {unit}")
        if unit != last:
            # Asked for while a later layer computed, and there before it was needed.
            assert back
            assert back[0].start < backward.start
        elif not back:
            continue
        assert max(span.end for span in back) <= backward.end
        # What comes back had left, storage by storage; another one of the layer may still be on its way.
        for returned, left in zip(back, sorted(span.end for span in out), strict=False):
            assert returned.start >= left


def test_a_slow_link_is_waited_for_in_both_directions(kit: Any, tmp_path: Path) -> None:
    speed = 2e7
    tracks = timeline(kit, tmp_path / "timeline.json", seconds=0.0, h2d_bytes_per_second=speed, d2h_bytes_per_second=speed)
    leaving = tracks.of("compute wait", "activations leaving model.layers.")
    coming = tracks.of("compute wait", "activations model.layers.")
    # Links take their set time, and forward and backward take what the links take.
    for track, waits in (("d2h", leaving), ("h2d", coming)):
        copies = tracks.of(track, "activations")
        needed = sum(span.nbytes for span in copies) / speed * 1e6
        assert sum(span.end - span.start for span in copies) >= needed
        # What leaves last need not be waited for.
        assert sum(span.end - span.start for span in waits) >= needed * 0.4
    # What backward waits for is what it reads next, in its order.
    order = [int(span.name.rsplit(".", 1)[1]) for span in coming]
    assert order == sorted(order, reverse=True)
