"""When units are entered and left: hooks that fire early, late, twice or never."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.traps import STREAMED, Layers, Net, ids_of, loss_of, pins_at, same


def test_modules_called_with_keywords_only(kit: Any) -> None:
    same(kit)


def test_a_module_called_twice(kit: Any) -> None:
    assert same(kit, "twice").booster.stats()["off_trace"] == 0


def test_a_full_backward_hook_is_not_needed_for_inputs_without_gradients(kit: Any) -> None:
    # The first block's input needs no gradient: it is left when its parameters are in.
    def loss(model: Any, step: int) -> torch.Tensor:
        return model(ids_of(step)).square().mean()

    def build() -> Net:
        net = Net()
        net.embed.weight.requires_grad_(False)
        return net

    device = kit.fit(build(), loss)
    kit.fit(build(), loss, **STREAMED).same_as(device)


def test_two_forwards_and_one_backward(kit: Any) -> None:
    def loss(model: Any, step: int) -> torch.Tensor:
        return model(ids_of(step)).square().mean() + model(ids_of(step + 100)).abs().mean()

    same(kit, loss=loss)


class AuxBlock(Layers):
    def forward(self, *, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.nn.functional.gelu(self.up(self.norm(x)))
        return x + self.down(hidden), hidden.mean()


class Aux(Net):
    """Every block gives something to an auxiliary loss, whose gradient is known before that of the block's main output."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        extra = []
        for block in self.blocks:
            x, aux = block(x=x)
            extra.append(aux)
        return self.head(x.mean(1)) + sum(extra)


def test_blocks_with_auxiliary_outputs(kit: Any) -> None:
    def build() -> Aux:
        net = Aux(blocks=0)
        net.blocks = nn.ModuleList(AuxBlock(32, 32 * (1 + index * 3 % 4)) for index in range(6))
        return net

    torch.manual_seed(0)
    initial = build().state_dict()

    def fresh() -> Aux:
        net = build()
        net.load_state_dict(initial)
        return net

    reference = kit.plain_fit(fresh(), loss_of)
    device = kit.fit(fresh(), loss_of)
    assert device.losses == pytest.approx(reference.losses, rel=1e-5)
    kit.fit(fresh(), loss_of, recompute="full").same_as(device)
    kit.fit(fresh(), loss_of, **STREAMED).same_as(device)
    kit.fit(fresh(), loss_of, **STREAMED, recompute="full").same_as(device)


class SideBlock(Layers):
    """Its first output is a side of an early step, whose gradient is asked for after those of all later steps."""

    def forward(self, *, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.up(self.norm(x))
        side = hidden.mean()
        return side, x + self.down(torch.nn.functional.gelu(hidden))


class Sides(Net):
    used = True

    def __init__(self) -> None:
        super().__init__(blocks=0)
        self.blocks = nn.ModuleList(SideBlock(32, 32 * (1 + index * 3 % 4)) for index in range(6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        sides = []
        for block in self.blocks:
            side, x = block(x=x)
            sides.append(side)
        out = self.head(x.mean(1))
        return out + sum(sides) if self.used else out


@pytest.mark.parametrize("used", [True, False])
def test_the_gradient_of_the_first_output_comes_last_or_never(kit: Any, used: bool) -> None:
    def build() -> Sides:
        net = Sides()
        net.used = used
        return net

    device = kit.fit(build(), loss_of)
    assert device.losses == pytest.approx(kit.plain_fit(build(), loss_of).losses, rel=1e-5)
    streamed = kit.fit(build(), loss_of, **STREAMED)
    streamed.same_as(device)
    # The block's last step runs its backward before that gradient is there, and has to find the chunk pinned.
    with pins_at(streamed, streamed.model.blocks[3].down, "blocks.3") as pins:
        streamed.booster.backward(loss_of(streamed.model, 7), streamed.optimizer)
    assert pins == [1]


def test_a_frozen_weight_behind_the_trainable_ones(kit: Any) -> None:
    # All gradients of the block are in before its norm, which is read once more to reach the blocks in front.
    def build() -> Net:
        net = Net(blocks=6, equal=False)
        for block in net.blocks:
            block.norm.requires_grad_(False)
        return net

    reference = kit.fit(build(), loss_of)
    streamed = kit.fit(build(), loss_of, **STREAMED, recompute="full")
    streamed.same_as(reference)
    with pins_at(streamed, streamed.model.blocks[3].norm, "blocks.3") as pins:
        streamed.booster.backward(loss_of(streamed.model, 7), streamed.optimizer)
    assert pins == [1]


def test_a_submodule_called_on_its_own_is_packed_too(kit: Any) -> None:
    def loss(model: Any, step: int) -> torch.Tensor:
        x = model.embed(ids_of(step))
        for block in model.blocks:
            x = block(x=x)
        return model.head(x.mean(1)).square().mean()

    def build(**options: Any) -> list[float]:
        booster, model, optimizer = kit.boosted(
            Net(blocks=8, equal=False), precision="fp32", micro_batch_size=None, seq_len=None, **options
        )
        losses = []
        for step in range(4):
            value = (loss if step else loss_of)(model, step)
            losses.append(value.item())
            booster.backward(value, optimizer)
            optimizer.step()
        booster.backward(loss(model, 9), optimizer)
        value = loss(model, 10)
        assert not booster._runtime.saved.active
        return [*losses, value.item()]

    assert build(**STREAMED) == build()


def test_parameters_on_the_root_and_inside_parents(kit: Any) -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.scale = nn.Parameter(torch.ones(16))
            self.first = nn.Linear(16, 16)
            self.inner = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(3)])
            self.unused = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x) * self.scale
            for block in self.inner:
                x = x + block(x) * self.scale
            return x * self.scale

    def loss(model: Any, step: int) -> torch.Tensor:
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        return model(x).square().mean()

    reference = kit.plain_fit(Parent(), loss)
    device = kit.fit(Parent(), loss)
    streamed = kit.fit(Parent(), loss, **STREAMED)
    streamed.same_as(device)
    assert device.losses == pytest.approx(reference.losses, rel=1e-5)
    kit.fit(Parent(), loss, **STREAMED, recompute="full").same_as(device)
    # A parent stays entered while its children run their backward.
    with pins_at(streamed, streamed.model.inner[1][0], "Parent") as pins:
        streamed.booster.backward(loss(streamed.model, 0), streamed.optimizer)
    assert pins == [1]
