"""Placement changes nothing: losses, norms and weights have the same bits wherever chunks live and whoever steps them."""

from __future__ import annotations

from typing import Any

import pytest

from tierwise import BudgetError

STATIC_HOST = {"placement_policy": "static", "offload_optim_frac": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "host optimizer": STATIC_HOST,
    "half and half": {"placement_policy": "static", "offload_optim_frac": 0.5, "offload_param_frac": 0.5},
    "all streamed": {**STATIC_HOST, "offload_param_frac": 1.0},
    "two threads": {**STATIC_HOST, "num_threads": 2},
    "recomputed": {**STATIC_HOST, "offload_param_frac": 1.0, "recompute": "full"},
    "states visiting": {**STATIC_HOST, "stream_optim_frac": 1.0},
    "states visiting beside the CPU, two threads": {**STATIC_HOST, "stream_optim_frac": 0.5, "num_threads": 2},
    "states visiting, speculating, slow links": {
        **STATIC_HOST,
        "stream_optim_frac": 0.5,
        "clip_mode": "speculate",
        "h2d_bytes_per_second": 1e8,
        "d2h_bytes_per_second": 5e7,
    },
    "a bit of everything": {
        "placement_policy": "static",
        "offload_optim_frac": 0.8,
        "offload_param_frac": 0.3,
        "stream_optim_frac": 0.3,
        "recompute": "full",
    },
    "speculating": {**STATIC_HOST, "clip_mode": "speculate"},
    "speculating, streamed": {**STATIC_HOST, "offload_param_frac": 1.0, "clip_mode": "speculate"},
    "sums on the host": {**STATIC_HOST, "accumulate_on": "host", "offload_param_frac": 0.5},
    "sums on the device": {**STATIC_HOST, "accumulate_on": "device", "offload_param_frac": 0.5},
    "sums on the device, speculating": {**STATIC_HOST, "accumulate_on": "device", "clip_mode": "speculate"},
    "slow links": {**STATIC_HOST, "offload_param_frac": 1.0, "h2d_bytes_per_second": 2e8, "d2h_bytes_per_second": 2e8},
}


@pytest.fixture(params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("max_norm", [None, 0.4])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_placement_gives_the_same_bits(kit: Any, precision: str, accumulation: int, max_norm: float | None) -> None:
    options = {"precision": precision, "gradient_accumulation_steps": accumulation, "max_norm": max_norm}
    # The reference waits for every step before the next forward; all others run ahead.
    reference = kit.train(kit.llama(), synchronous=True, **options)
    reference.norms = []
    plan = reference.booster._runtime.memory.plan
    assert all(chunk == {"class": "device", "home": "resident", "accumulate": "device"} for chunk in plan["chunks"])
    if max_norm is not None:
        assert reference.booster.stats()["clipped"] == 20
    # Four times as long with accumulation: what others cover is left out. Without, nothing is added up.
    left_out = {"half and half", "slow links"} if accumulation > 1 else {name for name in VARIANTS if name.startswith("sums")}
    variants = {name: variant for name, variant in VARIANTS.items() if name not in left_out}
    least = kit.tightest(kit.llama, **options)
    variants["tightest"] = {"device_budget": least}
    variants["tightest, speculating, two threads"] = {"device_budget": least, "clip_mode": "speculate", "num_threads": 2}
    for name, variant in variants.items():
        result = kit.train(kit.llama(), **{**options, **variant})
        stats = result.booster.stats()
        result.same_as(reference)
        assert stats["device_peak_bytes"] <= stats["device_budget_bytes"], name
        assert stats["host_peak_bytes"] <= stats["host_budget_bytes"], name
        assert (stats["states_visited_bytes"] > 0) == ("stream_optim_frac" in variant), name
        if name == "all streamed" or name.startswith("tightest"):
            assert stats["fetches"] > 0, name
            assert stats["evictions"] > 0, name
        assert stats["off_trace"] == 0, name


@pytest.mark.parametrize("param_frac", [0.0, 1.0], ids=["resident", "streamed"])
def test_speculation_really_steps_early_and_is_undone_by_clips(kit: Any, precision: str, param_frac: float) -> None:
    options = {**STATIC_HOST, "precision": precision, "offload_param_frac": param_frac}
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
    variants: tuple[dict[str, Any], ...] = ({}, {"offload_param_frac": 1.0}, {"clip_mode": "speculate"}, {"stream_optim_frac": 0.7})
    for variant in ({**STATIC_HOST, **options} for options in variants):
        kit.train(kit.llama(), **options, **variant).same_as(reference)


def test_fp16_losses_and_norms_do_not_show_the_scale(kit: Any) -> None:
    # A power of two that neither overflows nor loses gradients is folded into the step without a trace.
    small, large = (
        kit.train(kit.llama(), steps=5, synchronous=True, precision="fp16", initial_scale=scale) for scale in (2.0**12, 2.0**14)
    )
    plain = kit.train(kit.llama(), steps=5, synchronous=True, precision="fp32")
    assert large.norms == pytest.approx(small.norms, rel=1e-2)
    assert large.norms == pytest.approx(plain.norms, rel=5e-2)
    assert large.losses == pytest.approx(plain.losses, rel=5e-3)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_budgets_down_to_the_minimum(kit: Any, precision: str, accumulation: int) -> None:
    options: dict[str, Any] = {"precision": precision, "max_norm": 0.5, "gradient_accumulation_steps": accumulation}
    reference = kit.train(kit.llama(), steps=5, **options)
    least = kit.tightest(kit.llama, **options)
    everything = reference.booster.stats()["device_peak_bytes"]
    plans = set()
    steps = 8 if accumulation == 1 else 4
    for step in range(steps):
        budget = least + (everything - least) * step // (steps - 1)
        result = kit.train(kit.llama(), steps=5, device_budget=budget, **options)
        assert result.booster.stats()["device_budget_bytes"] == budget
        assert result.booster.stats()["device_peak_bytes"] <= budget
        result.same_as(reference)
        plans.add(str(result.booster._runtime.planned.plan["chunks"]))
    assert len(plans) >= steps // 2, "the sweep is meant to go through different plans"


def named_settings(message: str) -> list[dict[str, Any]]:
    """The settings that a refusal names, as options."""
    found = []
    for setting in message.split("these fit: ")[1].split(" or "):
        options: dict[str, Any] = {}
        for part in setting.split(" with "):
            name, value = part.split("=")
            options[name] = int(value) if value.isdigit() else value.strip("'")
        found.append(options)
    return found


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_states_visit_within_the_tightest_budget(kit: Any, accumulation: int, share: float) -> None:
    """Gradients that wait for their turn on a slow link, and the staging, are within what the planner names as the least."""
    options: dict[str, Any] = {"precision": "bf16", "max_norm": 0.5, "gradient_accumulation_steps": accumulation}
    reference = kit.train(kit.llama(), steps=5, **options)
    visiting = {**options, **STATIC_HOST, "stream_optim_frac": share, "h2d_bytes_per_second": 5e7}
    least = kit.tightest(kit.llama, **visiting)
    result = kit.train(kit.llama(), steps=5, device_budget=least, **visiting)
    plan = result.booster._runtime.planned.plan
    assert plan["device"]["staging"] > 0
    assert sum(plan["device"].values()) == least
    stats = result.booster.stats()
    assert stats["device_peak_bytes"] <= least
    assert stats["states_visited_bytes"] > 0
    result.same_as(reference)
    assert "stepped on the device, states visiting from host memory" in result.booster.explain()


def test_fractions_that_contradict_the_model_are_refused(kit: Any) -> None:
    with pytest.raises(ValueError, match=r"stream_optim_frac=0\.9 asks for .* lower stream_optim_frac or offload_param_frac"):
        kit.boosted(kit.llama(), **STATIC_HOST, offload_param_frac=0.5, stream_optim_frac=0.9)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("recompute", ["none", "auto"])
def test_one_byte_less_than_the_minimum_is_refused_with_settings_that_fit(kit: Any, recompute: str, accumulation: int) -> None:
    options: dict[str, Any] = {"recompute": recompute, "gradient_accumulation_steps": accumulation}
    least = kit.tightest(kit.llama, **options)
    kit.boosted(kit.llama(), **options, device_budget=least)
    with pytest.raises(BudgetError, match=r"needs 1 B more device memory at \S+ .*these fit: .* or ") as caught:
        kit.boosted(kit.llama(), **options, device_budget=least - 1)
    assert caught.value.shortfall_bytes == 1
    assert caught.value.op is not None
    assert sum(caught.value.breakdown.values()) == caught.value.needed_bytes == least
    settings = named_settings(str(caught.value))
    assert len(settings) == 2
    assert settings[0] != settings[1]
    for setting in settings:
        fitting = {**options, "device_budget": least - 1, "micro_batch_size": kit.BATCH, **setting}
        booster, model, optimizer = kit.boosted(kit.llama(), **fitting)
        for ids in kit.batches(2 * accumulation, rows=fitting["micro_batch_size"]):
            booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
            optimizer.step()
        stats = booster.stats()
        assert stats["device_peak_bytes"] <= stats["device_budget_bytes"]


def test_a_model_whose_boost_failed_is_named_as_such(kit: Any) -> None:
    model = kit.llama()
    with pytest.raises(BudgetError):
        kit.boosted(model, device_budget=1000)
    with pytest.raises(ValueError, match=r"earlier booster\.boost of this model failed.*build the model and its optimizer again"):
        kit.boosted(model)


def test_too_little_host_memory_is_refused_with_settings_that_fit(kit: Any) -> None:
    with pytest.raises(BudgetError, match=r"more host memory.*these fit: ") as caught:
        kit.boosted(kit.llama(), **STATIC_HOST, host_budget=1000)
    assert caught.value.tier == "host"
    assert caught.value.shortfall_bytes == caught.value.needed_bytes - 1000
    settings = named_settings(str(caught.value))
    assert len(settings) == 2
    for setting in settings:
        options = {**STATIC_HOST, "host_budget": 1000, **setting}
        if options["placement_policy"] == "auto":
            del options["offload_optim_frac"]
        kit.boosted(kit.llama(), **options)


def test_a_budget_that_the_step_outgrows_is_held(kit: Any) -> None:
    # A larger batch than was planned for does not fit: the emulated device refuses it, and goes on with what fits.
    options = {"precision": "bf16", "recompute": "none"}
    least = kit.tightest(kit.llama, **options)
    booster, model, optimizer = kit.boosted(kit.llama(), device_budget=least, **options)
    large, planned = kit.batches(1, rows=32)[0], kit.batches(1)[0]
    with pytest.raises(BudgetError, match="device budget exceeded: activations"):
        model(input_ids=large, labels=large)
    booster.backward(model(input_ids=planned, labels=planned).loss, optimizer)
    optimizer.step()
    booster.flush()
    assert booster.stats()["device_peak_bytes"] <= least


def test_auto_defers_where_speculating_gains_nothing(kit: Any) -> None:
    # Where speculating is faster is the planner's own test: a model of this size has nothing to hide.
    options = {**STATIC_HOST, "precision": "bf16", "max_norm": 1e6}
    result = kit.train(kit.llama(), clip_mode="auto", **options)
    runtime = result.booster._runtime
    assert runtime.memory.plan["clip_mode"] == runtime.planned.wanted["clip_mode"] == "defer"
    assert "clip_mode defer" in result.booster.explain()
    assert result.booster.stats()["speculated"] == 0
    result.same_as(kit.train(kit.llama(), **options))
