"""Exceptions and interrupts in forward and backward: what they leave behind, and that training goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.traps import STREAMED, VISITING, Net, loss_of


def test_an_exception_in_forward_leaves_no_hooks_behind(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)
    losses = []
    for step in range(4):
        if step % 2:
            model.blocks[2].fail = True
            with pytest.raises(ArithmeticError):
                loss_of(model, step)
            model.blocks[2].fail = False
            assert not booster._runtime.saved.active
            assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
            assert all(not c["forward_pins"] for c in booster._runtime.residency())
        loss = loss_of(model, step)
        losses.append(loss.item())
        booster.backward(loss, optimizer)
        optimizer.step()
    assert losses == kit.fit(Net(), loss_of, steps=4).losses


def test_an_interrupt_in_forward_is_cleaned_up_by_the_next(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)

    def interrupt(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt  # Module hooks with always_call do not run for it.

    losses = []
    for step in range(3):
        handle = model.blocks[2].down.register_forward_pre_hook(interrupt)
        if step:
            with pytest.raises(KeyboardInterrupt):
                loss_of(model, step)
        handle.remove()
        loss = loss_of(model, step)
        losses.append(loss.item())
        booster.backward(loss, optimizer)
        optimizer.step()
        assert all(not chunk["forward_pins"] for chunk in booster._runtime.residency())
    assert losses == kit.fit(Net(), loss_of, steps=3).losses


def test_an_exception_in_backward_can_be_survived(kit: Any) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("wanted by the test")

    class Net2(Net):
        bad = False

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for index, block in enumerate(self.blocks):
                x = block(x=x)
                if index == 1 and self.bad:
                    x = Fails.apply(x)
            return self.head(x.mean(1))

    for options in ({}, STREAMED, VISITING):
        booster, model, optimizer = kit.boosted(Net2(), precision="fp32", micro_batch_size=None, seq_len=None, **options)
        losses = []
        for step in range(4):
            model.bad = True
            with pytest.raises(ArithmeticError):
                booster.backward(loss_of(model, step), optimizer)
            model.bad = False
            loss = loss_of(model, step)
            losses.append(loss.item())
            booster.backward(loss, optimizer)
            optimizer.step()
        assert losses == kit.fit(Net(), loss_of, steps=4).losses
        booster.flush()
        assert booster.stats()["device_gradients_bytes"] == 0


def test_an_exception_in_a_later_micro_batch_says_what_went_with_it(kit: Any) -> None:
    options = {"precision": "fp32", "micro_batch_size": None, "seq_len": None, "gradient_accumulation_steps": 3}
    booster, model, optimizer = kit.boosted(Net(), **options)

    def refuse(grad: torch.Tensor) -> None:
        raise ArithmeticError("wanted by the test")

    for step in range(2):
        booster.backward(loss_of(model, step), optimizer)
    loss = loss_of(model, 2)
    loss.register_hook(refuse)
    with pytest.raises(ArithmeticError) as caught:
        booster.backward(loss, optimizer)
    assert any("micro-batch 3 of 3" in note and "the 2 before it" in note for note in caught.value.__notes__)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()  # There is nothing to step.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for step in range(3):
        booster.backward(loss_of(model, step), optimizer)
    optimizer.step()
    assert not torch.equal(model.state_dict()["head.weight"], before["head.weight"])


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_names_operation_residents_and_remedy(kit: Any, where: str) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)
    loss_of(model, 0)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB")

    def fail_in_backward(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(fail)

    block = model.blocks[2]
    handle = block.up.register_forward_hook(fail if where == "forward" else fail_in_backward)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        booster.backward(loss_of(model, 0), optimizer)
    handle.remove()
    (note,) = caught.value.__notes__
    for part in (f"in blocks.2 {where}", "stream_slab", "of a budget of 256.00 MiB", "reserve='", "a smaller micro_batch_size"):
        assert part in note, note
    booster.backward(loss_of(model, 0), optimizer)
    optimizer.step()
