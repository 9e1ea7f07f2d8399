"""Against plain torch: AdamW and clip_grad_norm_ in fp32 on the unboosted model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

STREAMED = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}


def plain(kit: Any, model: Any, optimizer: Any, steps: int, accumulation: int, max_norm: float | None) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    data = iter(kit.batches(steps * accumulation))
    for _ in range(steps):
        for _ in range(accumulation):
            ids = next(data)
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.item())
            (loss / accumulation).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf")).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


@pytest.mark.parametrize("options", [{}, STREAMED], ids=["device", "streamed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("accumulation", "max_norm"), [(1, None), (1, 0.5), (4, 0.5)])
def test_losses_and_norms_agree(kit: Any, options: dict[str, Any], tied: bool, accumulation: int, max_norm: float | None) -> None:
    model = kit.llama(tied=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    losses, norms = plain(kit, model, optimizer, 20, accumulation, max_norm)
    ours = kit.train(
        kit.llama(tied=tied), precision="fp32", gradient_accumulation_steps=accumulation, max_norm=max_norm, synchronous=True, **options
    )
    # Another order of additions in matmuls, loss and norm: 1e-5 is what fp32 leaves after 20 steps.
    assert ours.losses == pytest.approx(losses, rel=1e-5)
    # A forgotten division by the accumulation count would be invisible to Adam with clipping, but not to the norm.
    assert ours.norms == pytest.approx(norms, rel=1e-4)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=0, atol=2e-4)


def groups(model: Any) -> list[dict[str, Any]]:
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decay, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0, "lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-6}]


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_groups_schedules_and_coupled_decay(kit: Any, kind: str) -> None:
    from tierwise.booster import Booster

    def build() -> tuple[Any, Any, Any]:
        model = kit.llama()
        optimizer = getattr(torch.optim, kind)(groups(model), lr=3e-3, weight_decay=0.05)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)

    reference, optimizer, scheduler = build()
    losses, rates = [], []
    for ids in kit.batches(10):
        loss = reference(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        rates.append(scheduler.get_last_lr())
    model, optimizer, scheduler = build()
    booster = Booster(kit.plugin(precision="fp32", **STREAMED))
    model, optimizer, _, _, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
    assert optimizer is not None and scheduler is not None
    ours, our_rates = [], []
    for ids in kit.batches(10):
        loss = model(input_ids=ids, labels=ids).loss
        booster.backward(loss, optimizer)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ours.append(loss.item())
        our_rates.append(scheduler.get_last_lr())
    assert our_rates == rates
    assert ours == pytest.approx(losses, rel=1e-5)


def test_the_loss_falls_in_bf16(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(kit.llama(), precision="bf16", **STREAMED, max_norm=1.0)
    ids = kit.batches(1)[0]
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
