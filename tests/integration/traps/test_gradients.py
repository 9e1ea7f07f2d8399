"""Gradients on their way to the optimizer: consumed, clipped, forgotten, accumulated, not finite."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import tierwise
from tests.support.traps import STREAMED, VISITING, Net, ids_of, loss_of


def test_a_bare_backward_names_the_right_call(kit: Any) -> None:
    for options in ({}, STREAMED, VISITING):
        booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **options)
        with pytest.raises(tierwise.TierwiseError, match=r"booster\.backward"):
            loss_of(model, 0).backward()
        booster.backward(loss_of(model, 0), optimizer)
        optimizer.step()


def test_gradients_are_consumed_and_torch_clipping_is_warned_about(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None)
    booster.backward(loss_of(model, 0), optimizer)
    assert all(p.grad is None for p in model.parameters())
    with pytest.warns(UserWarning, match="max_norm to GeminiPlugin"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.nn.utils.clip_grad_norm_(nn.Linear(2, 2).parameters(), 1.0)
    assert optimizer.grad_norm > 0


def test_clipping_by_the_optimizer(kit: Any) -> None:
    by_plugin = kit.fit(Net(), loss_of, max_norm=1e-3)
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None)
    for step in range(6):
        booster.backward(loss_of(model, step), optimizer)
        optimizer.clip_grad_norm_(1e-3)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, by_plugin.weights[name])


def test_unused_and_frozen_parameters_stay_as_they_are(kit: Any) -> None:
    class Partly(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x=self.embed(ids))
            return self.head((self.blocks[2](x=x) if self.skip else self.blocks[1](x=x)).mean(1))

        skip = False

    def build() -> Partly:
        net = Partly()
        net.blocks[0].up.weight.requires_grad_(False)
        net.blocks[0].norm.requires_grad_(False)
        return net

    def loss(model: Any, step: int) -> torch.Tensor:
        model.skip = step % 3 == 2
        return model(ids_of(step)).square().mean()

    reference = kit.plain_fit(build(), loss)
    for options in ({}, STREAMED, VISITING):
        result = kit.fit(build(), loss, **options)
        assert result.losses == pytest.approx(reference.losses, rel=1e-5)
        fresh = build().state_dict()
        for name in ("blocks.3.up.weight", "blocks.0.up.weight", "blocks.0.norm.bias"):
            assert torch.equal(result.weights[name], fresh[name]), name
        steps = {name: result.optimizer.param_steps().get(p) for name, p in result.model.named_parameters()}
        assert steps["blocks.2.up.weight"] == 2
        assert steps["blocks.1.up.weight"] == 4
        assert steps["blocks.3.up.weight"] == 0
        assert steps["blocks.0.up.weight"] is None


def test_accumulation_boundaries(kit: Any) -> None:
    from tierwise.booster import Booster

    model: Any = Net()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    booster = Booster(kit.plugin(precision="fp32", micro_batch_size=None, seq_len=None, gradient_accumulation_steps=3))
    model, converted, _, _, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
    assert converted is optimizer
    assert scheduler.optimizer is optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, torch.optim.AdamW)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for micro in range(6):
        booster.backward(loss_of(model, micro), optimizer)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        changed = any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert changed == (micro >= 2), micro
        assert scheduler.get_last_lr() == [0.1 * 0.5 ** ((micro + 1) // 3)]
    assert booster.stats()["steps"] == 2


def test_more_backwards_than_the_plan_accumulates(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, gradient_accumulation_steps=2)
    for step in range(2):
        booster.backward(loss_of(model, step), optimizer)
    with pytest.raises(tierwise.TierwiseError, match="set gradient_accumulation_steps=3"):
        booster.backward(loss_of(model, 2), optimizer)
    optimizer.step()
    booster.backward(loss_of(model, 2), optimizer)
    booster.flush()
    assert booster.stats()["steps"] == 1, "the refused call must not lose the gradients before it"


def test_zero_grad_without_a_step_forgets_the_batch(kit: Any) -> None:
    for options in ({}, STREAMED, VISITING, {**STREAMED, "clip_mode": "speculate"}):
        booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **options)
        booster.backward(loss_of(model, 7), optimizer)
        optimizer.zero_grad()
        losses = []
        for step in range(4):
            loss = loss_of(model, step)
            losses.append(loss.item())
            booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        assert losses == kit.fit(Net(), loss_of, steps=4).losses


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_non_finite_gradients_changes_nothing(kit: Any, bad: float) -> None:
    def loss(model: Any, step: int) -> torch.Tensor:
        return loss_of(model, step) * (bad if step == 2 else 1.0)

    for options in ({}, STREAMED, VISITING, {"placement_policy": "static", "offload_optim_frac": 1.0, "clip_mode": "speculate"}):
        booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, max_norm=1.0, **options)
        for step in range(4):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            booster.backward(loss(model, step), optimizer)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.last_step_skipped == (step == 2)
            equal = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            assert equal == (step == 2)
        assert set(optimizer.param_steps().values()) == {3}


def test_denormal_moments_become_zero(kit: Any) -> None:
    def loss(model: Any, step: int) -> torch.Tensor:
        return loss_of(model, step) * (1e-30 if step == 0 else 0.0)

    for options in ({}, STREAMED, VISITING):
        result = kit.fit(Net(), loss, steps=12, **options)
        result.booster.flush()
        for param in result.model.parameters():
            for value in result.optimizer.read_state(param).values():
                assert ((value == 0) | (value.abs() >= 2.0**-126)).all()
