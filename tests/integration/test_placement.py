"""Placement changes nothing: losses, norms and weights have the same bits wherever chunks live and whoever steps them."""

from __future__ import annotations

from typing import Any

import pytest

STATIC_HOST = {"placement_policy": "static", "offload_optim_frac": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "host optimizer": STATIC_HOST,
    "half and half": {"placement_policy": "static", "offload_optim_frac": 0.5, "offload_param_frac": 0.5},
    "all streamed": {**STATIC_HOST, "offload_param_frac": 1.0},
    "two threads": {**STATIC_HOST, "num_threads": 2},
    "recomputed": {**STATIC_HOST, "offload_param_frac": 1.0, "recompute": "full"},
    "speculating": {**STATIC_HOST, "clip_mode": "speculate"},
    "speculating, streamed": {**STATIC_HOST, "offload_param_frac": 1.0, "clip_mode": "speculate"},
    "slow links": {**STATIC_HOST, "offload_param_frac": 1.0, "h2d_bytes_per_second": 2e8, "d2h_bytes_per_second": 2e8},
}


@pytest.fixture(params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("max_norm", [None, 0.4])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_placement_gives_the_same_bits(kit: Any, precision: str, accumulation: int, max_norm: float | None) -> None:
    options = {"precision": precision, "gradient_accumulation_steps": accumulation, "max_norm": max_norm}
    reference = kit.train(kit.llama(), **options)
    plan = reference.booster._runtime.memory.plan
    assert all(chunk == {"class": "device", "home": "resident"} for chunk in plan["chunks"])
    if max_norm is not None:
        assert reference.booster.stats()["clipped"] == 20
    variants = dict(VARIANTS)
    variants["tightest"] = {"device_budget": kit.tightest(kit.llama, **options)}
    for name, variant in variants.items():
        result = kit.train(kit.llama(), **{**options, **variant})
        stats = result.booster.stats()
        result.same_as(reference)
        assert stats["device_peak_bytes"] <= stats["device_budget_bytes"], name
        if name in ("all streamed", "tightest"):
            assert stats["fetches"] > 0, name
        assert stats["off_trace"] == 0, name


def test_speculation_really_steps_early_and_is_undone_by_clips(kit: Any) -> None:
    options = {**STATIC_HOST, "precision": "bf16"}
    quiet = kit.train(kit.llama(), clip_mode="speculate", max_norm=1e6, **options)
    assert quiet.booster.stats()["speculated"] > 0
    assert quiet.booster.stats()["undone"] == 0
    quiet.same_as(kit.train(kit.llama(), max_norm=1e6, **options))
    # A limit that lies among the norms: some steps clip, after others of their chunks were stepped.
    limit = sorted(kit.train(kit.llama(), synchronous=True, **options).norms)[10]
    mixed = kit.train(kit.llama(), clip_mode="speculate", max_norm=limit, **options)
    assert mixed.booster.stats()["undone"] > 0
    assert 0 < mixed.booster.stats()["clipped"] < 20
    mixed.same_as(kit.train(kit.llama(), max_norm=limit, **options))


@pytest.mark.parametrize("clip_mode", ["defer", "speculate", "auto"])
def test_deferred_steps_equal_synchronous_ones(kit: Any, precision: str, clip_mode: str) -> None:
    options = {**STATIC_HOST, "precision": precision, "max_norm": 0.9, "clip_mode": clip_mode, "offload_param_frac": 0.5}
    synchronous = kit.train(kit.llama(), synchronous=True, **options)
    deferred = kit.train(kit.llama(), **options)
    synchronous.norms = []
    deferred.same_as(synchronous)


def test_norms_do_not_depend_on_placement(kit: Any) -> None:
    options = {"precision": "bf16", "max_norm": 0.5, "synchronous": True}
    reference = kit.train(kit.llama(), **options)
    assert len(set(reference.norms)) == 20
    kit.train(kit.llama(), **options, **STATIC_HOST).same_as(reference)
    kit.train(kit.llama(), **options, **STATIC_HOST, offload_param_frac=1.0, num_threads=2).same_as(reference)


def test_fp16_with_its_loss_scale(kit: Any) -> None:
    options = {"precision": "fp16", "max_norm": 0.5, "initial_scale": 2.0**24, "growth_interval": 4}
    reference = kit.train(kit.llama(), **options)
    assert reference.booster.stats()["skipped"] > 0, "the first scale is meant to overflow"
    assert reference.booster.stats()["skipped"] < 20
    for variant in (STATIC_HOST, {**STATIC_HOST, "offload_param_frac": 1.0}, {**STATIC_HOST, "clip_mode": "speculate"}):
        kit.train(kit.llama(), **options, **variant).same_as(reference)


@pytest.mark.parametrize("step", range(8))
def test_budgets_down_to_the_minimum(kit: Any, step: int) -> None:
    options: dict[str, Any] = {"precision": "bf16", "max_norm": 0.5}
    reference = kit.train(kit.llama(), steps=6, **options)
    least = kit.tightest(kit.llama, **options)
    everything = reference.booster.stats()["device_peak_bytes"]
    budget = least + (everything - least) * step // 7
    result = kit.train(kit.llama(), steps=6, device_budget=budget, **options)
    assert result.booster.stats()["device_peak_bytes"] <= budget
    result.same_as(reference)


def test_one_byte_less_than_the_minimum_is_refused(kit: Any) -> None:
    from tierwise import BudgetError

    least = kit.tightest(kit.llama)
    with pytest.raises(BudgetError, match=r"needs .* more device memory at .*these fit: .* or "):
        kit.boosted(kit.llama(), device_budget=least - 1)
