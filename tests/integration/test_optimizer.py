"""The converted optimizer as users know it: state dicts, resuming, refusals, train_step."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tierwise
from tierwise import _core
from tierwise.booster import Booster
from tierwise.gemini.correction import measured_activation_bytes

STREAMED: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}


def steps(booster: Any, model: Any, optimizer: Any, data: list[Any]) -> list[float]:
    losses = []
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        if booster is None:
            loss.backward()
        else:
            booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, STREAMED], ids=["device", "streamed"])
def test_state_dict_resumes_to_the_bit(kit: Any, precision: str, options: dict[str, Any]) -> None:
    data = kit.batches(8)
    booster, model, optimizer = kit.boosted(kit.llama(), precision=precision, **options)
    steps(booster, model, optimizer, data[:4])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = steps(booster, model, optimizer, data[4:])
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"} | (set() if precision == "fp32" else {"master"})
    assert state["state"][0]["step"].item() == 4
    other, fresh, restarted = kit.boosted(kit.llama(seed=5), precision=precision)
    fresh.load_state_dict(weights)
    restarted.load_state_dict(state)
    assert steps(other, fresh, restarted, data[4:]) == expected


def test_a_plain_optimizer_is_continued_and_continues(kit: Any) -> None:
    data = kit.batches(9)
    plain = kit.llama()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    steps(None, plain, plain_optimizer, data[:3])
    resumed, saved = copy.deepcopy(plain), copy.deepcopy(plain_optimizer.state_dict())
    expected = steps(None, plain, plain_optimizer, data[3:])
    # A plain optimizer with state, boosted.
    carried = torch.optim.AdamW(resumed.parameters(), lr=3e-3)
    carried.load_state_dict(saved)
    booster = Booster(kit.plugin(precision="fp32", **STREAMED))
    model, optimizer, *_ = booster.boost(resumed, carried)
    assert steps(booster, model, optimizer, data[3:6]) == pytest.approx(expected[:3], rel=1e-5)
    assert optimizer is not None
    # Back to plain.
    back = kit.llama()
    back.load_state_dict(model.state_dict())
    back_optimizer = torch.optim.AdamW(back.parameters(), lr=1.0)
    back_optimizer.load_state_dict(optimizer.state_dict())
    assert back_optimizer.param_groups[0]["lr"] == 3e-3
    assert steps(None, back, back_optimizer, data[6:]) == pytest.approx(expected[3:], rel=1e-5)


def test_a_plain_state_dict_loads_into_a_boosted_optimizer(kit: Any) -> None:
    data = kit.batches(6)
    plain = kit.llama()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    steps(None, plain, plain_optimizer, data[:3])
    weights, saved = copy.deepcopy(plain.state_dict()), copy.deepcopy(plain_optimizer.state_dict())
    expected = steps(None, plain, plain_optimizer, data[3:])
    booster, model, optimizer = kit.boosted(kit.llama(), precision="fp32", **STREAMED)
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    assert steps(booster, model, optimizer, data[3:]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="param groups of"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_options_are_refused_by_name(kit: Any, option: str) -> None:
    model = kit.llama()
    options: dict[str, Any] = {option: True}
    with pytest.raises(ValueError, match=option):
        Booster(kit.plugin()).boost(model, torch.optim.AdamW(model.parameters(), **options))


def test_foreach_and_fused_are_hints(kit: Any) -> None:
    hints: list[dict[str, Any]] = [{"foreach": True}, {"fused": True}]
    for hint in hints:
        model = kit.llama()
        optimizer = torch.optim.AdamW(model.parameters(), **hint)
        booster = Booster(kit.plugin(precision="fp32"))
        steps(booster, *booster.boost(model, optimizer)[:2], kit.batches(1))


def test_what_cannot_be_boosted(kit: Any) -> None:
    model = kit.llama()
    with pytest.raises(ValueError, match="SGD is not supported"):
        Booster(kit.plugin()).boost(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="parameters that the model does not have"):
        Booster(kit.plugin()).boost(model, torch.optim.AdamW(kit.llama().parameters()))
    with pytest.raises(ValueError, match="no parameters"):
        Booster(kit.plugin()).boost(torch.nn.ReLU())
    booster, model, optimizer = kit.boosted(model)
    with pytest.raises(ValueError, match="boosted already"):
        Booster(kit.plugin()).boost(model)
    with pytest.raises(ValueError, match="one Booster per model"):
        booster.boost(kit.llama())
    with pytest.raises(ValueError, match="add_param_group"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(tierwise.TierwiseError, match="cannot be copied"):
        copy.deepcopy(model)


def test_gradients_that_no_optimizer_takes_are_warned_of(kit: Any) -> None:
    model = kit.llama()
    optimizer = torch.optim.AdamW(model.model.layers.parameters())
    with pytest.warns(
        UserWarning, match=r"3 parameters .* \(the first is 'model.embed_tokens.weight'\).*requires_grad_\(False\)"
    ) as caught:
        Booster(kit.plugin()).boost(model, optimizer)
    assert [warning.filename for warning in caught] == [__file__], "it points to who called boost"


def test_a_parameter_unfrozen_after_boosting_is_refused(kit: Any) -> None:
    model = kit.llama()
    model.model.norm.weight.requires_grad_(False)
    booster, model, optimizer = kit.boosted(model, precision="fp32")
    model.model.norm.weight.requires_grad_(True)
    ids = kit.batches(1)[0]
    booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
    with pytest.raises(ValueError, match="was frozen"):
        optimizer.step()


def test_inference_without_an_optimizer(kit: Any) -> None:
    ids = kit.batches(1)[0]
    expected = kit.llama().eval()(input_ids=ids).logits
    booster = Booster(kit.plugin(precision="fp32", placement_policy="static", offload_param_frac=1.0, offload_optim_frac=1.0))
    model, optimizer, *_ = booster.boost(kit.llama().eval())
    assert optimizer is None
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert booster.stats()["fetches"] > 0


def test_schedulers_created_before_and_after(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(kit.llama(), precision="fp32", lr=0.1)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 2), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[2],
    )
    rates = []
    for ids in kit.batches(4):
        rates.append(optimizer.param_groups[0]["lr"])
        booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.05, 0.05, 0.1, 0.09])


def test_step_hooks_run(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(kit.llama(), precision="fp32")
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    steps(booster, model, optimizer, kit.batches(1))
    assert seen == ["before", "after"]


@pytest.mark.parametrize("ignored", [0, 9])
def test_train_step_equals_the_whole_batch(kit: Any, ignored: int) -> None:
    # 4 micro-batches whose labels have different numbers of tokens: the mean is over the batch's tokens.
    ids = kit.batches(1, rows=8)[0]
    labels = ids.clone()
    labels[:2, :ignored] = -100
    whole, _, whole_optimizer = kit.boosted(kit.llama(), precision="fp32", micro_batch_size=8)
    expected = whole.train_step({"input_ids": ids, "labels": labels})
    parts, _, optimizer = kit.boosted(kit.llama(), precision="fp32", micro_batch_size=2, gradient_accumulation_steps=4, **STREAMED)
    loss = parts.train_step({"input_ids": ids, "labels": labels})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert optimizer.grad_norm == pytest.approx(whole_optimizer.grad_norm, rel=1e-5)
    assert parts.stats()["steps"] == 1
    with pytest.raises(ValueError, match="ask for 2 x 4 = 8"):
        parts.train_step({"input_ids": ids[:3], "labels": ids[:3]})


def test_the_dataloader_says_the_shapes(kit: Any) -> None:
    data: Any = [{"input_ids": ids[0], "labels": ids[0], "length": torch.tensor(16)} for ids in kit.batches(6)]
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    model = kit.llama()
    optimizer: Any = torch.optim.AdamW(model.parameters())
    booster = Booster(kit.plugin(precision="fp32", micro_batch_size=None, seq_len=None))
    state = torch.get_rng_state()
    model, optimizer, _, same, _ = booster.boost(model, optimizer, dataloader=loader)
    assert same is loader
    assert torch.equal(torch.get_rng_state(), state), "boosting must not change which samples come first"
    assert "48 tokens per micro-batch" in booster.explain()
    for batch in loader:
        booster.train_step({"input_ids": batch["input_ids"], "labels": batch["labels"]})
    booster.flush()
    assert booster.stats()["steps"] == 2


def test_the_plan_is_explained_and_a_timeline_written(kit: Any, tmp_path: Any) -> None:
    booster, model, optimizer = kit.boosted(kit.llama(), precision="bf16", **STREAMED)
    text = booster.explain()
    assert "one GiB more of either memory would save nothing" in text, "fractions place chunks, not budgets"
    for part in ("stepped by the CPU", "parameters streamed", "device:", "host:", "bounded by", "device peak at"):
        assert part in text
    booster.record_timeline()
    steps(booster, model, optimizer, kit.batches(2))
    booster.timeline(tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())
    assert events


def test_the_explanation_has_the_simulators_step(kit: Any) -> None:
    # Streaming through a slow link is what the step waits for, and the simulator's executor says so.
    options = {**STREAMED, "h2d_bytes_per_second": 2e7, "d2h_bytes_per_second": 1e12}
    booster, *_ = kit.boosted(kit.llama(), precision="bf16", **options)
    planned = booster._runtime.planned
    arguments = planned.trace_json, planned.plan_json, json.dumps(planned.wanted)
    step = json.loads(_core.simulate_plan(booster._runtime.layout, *arguments))
    assert step["h2d_bytes"] > 0
    assert step["stalls"]["parameter_fetch_ns"] + step["stalls"]["optimizer_step_ns"] > step["step_ns"] / 2
    line = next(line for line in booster.explain().splitlines() if line.startswith("simulated step: "))
    assert line.startswith(f"simulated step: {step['step_ns'] / 1e9:.3g} s")
    assert "waiting for: " in line
    with pytest.raises(ValueError, match="the plan is for"):
        _core.simulate_plan(kit.boosted(kit.llama(layers=1), precision="bf16")[0]._runtime.layout, *arguments)


def test_a_larger_budget_is_worth_what_the_plan_with_it_predicts(kit: Any) -> None:
    least = kit.tightest(kit.llama)
    tight, *_ = kit.boosted(kit.llama(), device_budget=least)
    roomy, *_ = kit.boosted(kit.llama(), device_budget=least + 2**30)
    now, then = (booster._runtime.planned.plan["predicted_step_s"] for booster in (tight, roomy))
    assert then < now
    assert f"one GiB more would save: device memory {(now - then) * 1e3:.3g} ms" in tight.explain()


def test_the_measured_peak_corrects_the_plan(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierwise.gemini import tracing

    real = tracing._run

    def exaggerated(*args: Any, **kwargs: Any) -> Any:
        trace = real(*args, **kwargs)
        for unit in trace.units:
            unit.saved_bytes *= 3
        return trace

    options = {"precision": "bf16", "max_norm": 0.5, "recompute": "none", "reserve": 0}
    reference = kit.train(kit.llama(), **options)
    peak = reference.booster.stats()["device_peak_bytes"]
    monkeypatch.setattr(tracing, "_run", exaggerated)
    moved = 0
    for budget in range(peak + 100_000, peak + 700_000, 200_000):
        corrected = kit.train(kit.llama(), device_budget=budget, **options)
        planned = [chunk["class"] for chunk in json.loads(corrected.booster._runtime.planned.plan_json)["chunks"]]
        classes = [chunk["class"] for chunk in corrected.booster._runtime.memory.plan["chunks"]]
        assert corrected.booster.stats()["device_peak_bytes"] <= budget
        moved += classes.count("device") - planned.count("device")
        corrected.same_as(reference)
    assert moved > 0


def test_a_correction_takes_only_room_at_the_peak_of_the_plan(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inputs of 24 recomputed layers are alive when backward begins, and most gradients when it ends: that is the peak of these plans.
    from tierwise.gemini import tracing

    real = tracing._run

    def exaggerated(*args: Any, **kwargs: Any) -> Any:
        trace = real(*args, **kwargs)
        for unit in trace.units:
            unit.saved_bytes *= 3
            unit.input_bytes *= 3
        return trace

    options = {"steps": 2, "seq": 48, "precision": "bf16", "max_norm": 0.5, "recompute": "full", "reserve": 0}
    reference = kit.train(kit.llama(24), **options)
    peak = reference.booster.stats()["device_peak_bytes"]
    monkeypatch.setattr(tracing, "_run", exaggerated)
    moved = 0
    for share in (0.648, 0.718, 0.789, 0.86):
        budget = int(peak * share)
        corrected = kit.train(kit.llama(24), device_budget=budget, **options)
        runtime = corrected.booster._runtime
        before = json.loads(runtime.planned.plan_json)
        assert [chunk["class"] for chunk in before["chunks"]].count("host") > 0
        count = [chunk["class"] for chunk in runtime.memory.plan["chunks"]].count("device")
        moved += count - [chunk["class"] for chunk in before["chunks"]].count("device")
        # A part of the room for activations is now in other hands, and the report says so (parameters are aligned in it).
        after = runtime.planned.plan["device"]
        assert sum(after.values()) == sum(before["device"].values())
        fixed = ("resident_params", "states", "stream_slab")
        assert sum(after[name] for name in fixed) == pytest.approx(corrected.booster.stats()["device_static_bytes"], abs=1024)
        corrected.same_as(reference)
    assert moved > 0


def test_on_cuda_a_peak_as_planned_leaves_no_room() -> None:
    # A plan for 52.15 GiB whose activations alone peak at 6.95 GiB, earlier in backward.
    device = {"states": 32600, "gradients": 6650, "resident_params": 6520, "activations": 2970, "reserve": 2350, "stream_slab": 772}
    # Gradients that may be on their way so that the training thread runs ahead may not have been: their room is none.
    for peak, temporary, ahead, room in (
        (51212, 1700, 0, 0),
        (50212, 1700, 0, 1000),
        (51862, 4000, 0, 0),
        (50212, 1700, 600, 400),
        (44000, 1700, 9000, 562),
    ):
        search = SimpleNamespace(temporary_bytes=lambda _, size=temporary: size)
        target = SimpleNamespace(emulated=False, torch_device="cuda")
        planned = SimpleNamespace(plan={"device": device, "grad_ahead_bytes": ahead})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "max_memory_allocated", lambda _, peak=peak: peak)
            runtime: Any = SimpleNamespace(target=target, planned=planned, search=search, trace=None)
            assert measured_activation_bytes(runtime) == device["activations"] - room
