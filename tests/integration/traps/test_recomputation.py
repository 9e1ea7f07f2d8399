"""Forwards that run again inside a backward: checkpoints of modules, layers and regions, and our own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import tierwise
from tests.support.traps import STREAMED, Net, loss_of, pins_at, same


def enable_checkpointing(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # The name changes in transformers 6.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def test_checkpointing_whose_hooks_fire_again(kit: Any) -> None:
    # transformers before 5.2x checkpoints `__call__`: module hooks fire again in the recomputation, early stop skips post hooks.
    same(kit, "checkpoint")


def test_checkpointing_of_forward_which_hooks_never_see(kit: Any) -> None:
    options = {"precision": "fp32"}
    plain = kit.train(kit.llama(), steps=5, **options)

    def own_checkpointing() -> Any:
        return enable_checkpointing(kit.llama())

    kit.train(own_checkpointing(), steps=5, **options).same_as(plain)
    calls = []
    counted = own_checkpointing()
    counted.model.layers[1].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    kit.train(counted, steps=1, recompute="full", **options)
    assert len(calls) == 1 + 1 + 1, "traced, run and recomputed once: not checkpointed twice"
    streamed = kit.train(own_checkpointing(), steps=5, **options, **STREAMED)
    streamed.same_as(plain)
    assert streamed.booster._runtime.planned.plan["activations"][1:4] == ["recompute"] * 3, "the plan has to count with it"


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_layers_that_checkpoint_themselves_are_not_checkpointed_again(kit: Any, recompute: str) -> None:
    model = enable_checkpointing(kit.llama())
    calls = []
    model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda *args: calls.append(1))
    # Early stop would end a second recomputation before it reaches anything that could be counted.
    with set_checkpoint_early_stop(False):
        result = kit.train(model, steps=1, recompute=recompute, precision="fp32")
    assert len(calls) == 1 + 1 + 1, "traced, run and recomputed once"
    assert result.booster._runtime.planned.plan["activations"][1:4] == ["recompute"] * 3, (
        "the plan has to count with it, whatever was asked for"
    )


def test_checkpointing_enabled_after_boosting(kit: Any) -> None:
    plain = kit.train(kit.llama(), steps=3, precision="fp32")
    booster, model, optimizer = kit.boosted(kit.llama(), precision="fp32", **STREAMED)
    enable_checkpointing(model)
    losses = []
    for ids in kit.batches(3):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        booster.backward(loss, optimizer)
        optimizer.step()
    assert losses == plain.losses


def test_our_own_recomputation(kit: Any) -> None:
    plain = kit.train(kit.llama(), steps=5, precision="fp32", recompute="none")
    again = kit.train(kit.llama(), steps=5, precision="fp32", recompute="full", **STREAMED)
    again.same_as(plain)
    runtime = again.booster._runtime
    assert runtime.planned.plan["activations"][1:4] == ["recompute"] * 3
    assert runtime.counter.peak_bytes < plain.booster._runtime.counter.peak_bytes
    # What a recomputation saves counts as well, one layer's worth at a time.
    layer = runtime.saved_bytes(1)
    assert runtime.counter.peak_bytes == pytest.approx(runtime.trace.activation_peak_bytes(runtime.planned.plan["activations"]), rel=0.1)
    assert runtime.counter.peak_bytes > layer


def test_dropout_is_recomputed_with_its_own_random_state(kit: Any) -> None:
    options = {"precision": "fp32", "steps": 3}
    config = {"attention_dropout": 0.3}
    kit.train(kit.llama(**config), recompute="full", **options).same_as(kit.train(kit.llama(**config), recompute="none", **options))


class Reentrant(Net):
    """Reentrant checkpoints run a backward inside the backward; a weight that is used outside too gets its gradient in two parts."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.front = nn.Linear(32, 64, bias=False)
        if shared:
            self.blocks[2].up.weight = self.front.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.front(self.embed(ids))[..., :32]
        for block in self.blocks:
            x = checkpoint(lambda x, b=block: b(x=x), x, use_reentrant=True)
        return self.head(x.mean(1))


@pytest.mark.parametrize("shared", [False, True])
def test_reentrant_checkpoints_and_shared_weights(kit: Any, shared: bool) -> None:
    reference = kit.plain_fit(Reentrant(shared), loss_of)
    device = kit.fit(Reentrant(shared), loss_of)
    assert device.losses == pytest.approx(reference.losses, rel=1e-5)
    kit.fit(Reentrant(shared), loss_of, **STREAMED).same_as(device)


def test_a_gradient_in_two_parts_is_an_error_not_half_a_gradient(kit: Any) -> None:
    class Twice(Reentrant):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for _ in range(2):
                x = checkpoint(lambda x: self.blocks[0](x=x), x, use_reentrant=True)
            return self.head(x.mean(1))

    booster, model, optimizer = kit.boosted(Twice(False), precision="fp32", micro_batch_size=None, seq_len=None)
    with pytest.raises(tierwise.TierwiseError, match=r"gradient of 'blocks\.0\..*arrived again.*use_reentrant=False"):
        booster.backward(loss_of(model, 0), optimizer)


def test_a_region_of_two_blocks(kit: Any) -> None:
    same(kit, "region")


class OneRegion(Net):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self._all, self.embed(ids), use_reentrant=False)
        return self.head(x.mean(1))

    def _all(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x=x)
        return x


def test_the_plan_counts_with_regions(kit: Any) -> None:
    device = kit.fit(OneRegion(blocks=8), loss_of)
    streamed = kit.fit(OneRegion(blocks=8), loss_of, **STREAMED)
    streamed.same_as(device)
    region = sum(p.numel() * 4 for p in streamed.model.blocks.parameters())
    assert streamed.booster._runtime.planned.plan["stream_slab_bytes"] >= region


def test_an_unplanned_region_that_does_not_fit_is_an_error_not_a_wrong_gradient(kit: Any) -> None:
    class Later(OneRegion):
        region = False

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) if self.region else Net.forward(self, ids)

    booster, model, optimizer = kit.boosted(Later(blocks=8), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)
    booster.backward(loss_of(model, 0), optimizer)
    optimizer.step()
    model.region = True
    with pytest.raises(tierwise.TierwiseError, match=r"no slot .*blocks.*checkpoint smaller regions"):
        booster.backward(loss_of(model, 1), optimizer)
    model.region = False
    booster.backward(loss_of(model, 1), optimizer)
    optimizer.step()


@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_of_a_region_keep_their_slots_until_their_own_backward(kit: Any, frozen: bool) -> None:
    class Moving(Net):
        """A region of three blocks in front while planning, among the last blocks later: room enough, and others to prefetch into it."""

        start = 0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for index, block in enumerate(self.blocks):
                if index == self.start:
                    x = checkpoint(self._three, x, use_reentrant=False)
                elif not self.start < index < self.start + 3:
                    x = block(x=x)
            return self.head(x.mean(1))

        def _three(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks[self.start : self.start + 3]:
                x = block(x=x)
            return x

    def loss(model: Any, step: int) -> torch.Tensor:
        model.start = 6 if step else 0
        return loss_of(model, step)

    def build() -> Moving:
        net = Moving(blocks=10)
        if frozen:  # Gradients that never come do not tell when a unit is over.
            net.blocks[6].requires_grad_(False)
        return net

    reference = kit.fit(build(), loss)
    # The model's own region is the only one.
    streamed = kit.fit(build(), loss, **{**STREAMED, "recompute": "none"})
    streamed.same_as(reference)
    # Whatever is evicted or not: while block 7 runs its backward, block 6, recomputed with it, must be pinned.
    with pins_at(streamed, streamed.model.blocks[7].up, "blocks.6") as pins:
        streamed.booster.backward(loss(streamed.model, 7), streamed.optimizer)
    assert pins == [1]
