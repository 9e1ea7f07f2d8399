"""Parameters and saved tensors of chunks that move, are elsewhere, or were rewritten."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import tierwise
from tests.support.traps import STREAMED, Net, loss_of, same


def test_a_streamed_out_parameter_has_its_shape_and_is_loud(kit: Any) -> None:
    result = same(kit)
    for param in result.model.parameters():
        assert param.isnan().all()
        assert param.untyped_storage().nbytes() <= 4
    assert result.model.blocks[0].up.weight.shape == (64, 32)
    assert sum(p.numel() for p in result.model.parameters()) == sum(p.numel() for p in Net().parameters())
    with torch.no_grad():
        stray = torch.nn.functional.linear(torch.ones(1, 32), result.model.blocks[0].up.weight)
    assert stray.isnan().all()


def test_saved_views_of_moving_slots(kit: Any) -> None:
    # Several chunks pass through few slots between a layer's forward and its backward: raw addresses would read another chunk.
    result = kit.fit(Net(blocks=8, equal=False), loss_of, **STREAMED)
    assert result.booster.stats()["evictions"] > 0
    result.same_as(kit.fit(Net(blocks=8, equal=False), loss_of))


def test_a_late_node_finds_its_weight_wherever_it_is(kit: Any) -> None:
    # Nothing is recomputed, whatever the planner finds faster: a checkpoint's tensors can be read once only.
    options = {**STREAMED, "recompute": "none"}
    booster, model, optimizer = kit.boosted(Net(blocks=8, equal=False), precision="fp32", micro_batch_size=None, seq_len=None, **options)
    loss_of(model, 0)  # Plans.
    outputs: list[torch.Tensor] = []
    handles = [block.down.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in model.blocks]
    loss = loss_of(model, 0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    node: Any = outputs[2].grad_fn
    while not hasattr(node, "_saved_mat2"):
        node = node.next_functions[0][0]
    # Reading this unpacks it, with no unit entered and its chunk evicted.
    assert torch.equal(node._saved_mat2, weights["blocks.2.down.weight"].t())
    booster.backward(loss, optimizer)
    for handle in handles:
        handle.remove()


def test_a_touched_chunk_is_not_mapped_for_longer_than_its_unit(kit: Any) -> None:
    # It keeps its slot until the next operation, and then nobody would say that its parameters point at another chunk's bytes.
    booster, model, _ = kit.boosted(Net(blocks=8, equal=False), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)
    loss_of(model, 0)
    runtime = booster._runtime
    block = model.blocks[2]
    chunk = runtime.grouping.place[block.down.weight][0]

    def touches(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        runtime.engine.touch(chunk, 0)

    handle = block.down.register_forward_hook(touches)
    loss_of(model, 0)
    handle.remove()
    assert chunk not in runtime.saved.mapped
    assert block.down.weight.isnan().all()


@pytest.mark.parametrize("options", [{}, {"placement_policy": "static", "offload_optim_frac": 1.0}, STREAMED])
@pytest.mark.parametrize("flushed", [True, False])
def test_a_graph_older_than_the_parameters_is_an_error(kit: Any, options: dict[str, Any], flushed: bool) -> None:
    booster, model, optimizer = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **options)
    old = loss_of(model, 0)
    booster.backward(loss_of(model, 1), optimizer)
    optimizer.step()
    if flushed:
        booster.flush()
    with pytest.raises(tierwise.TierwiseError, match="rewritten since its forward"):
        booster.backward(old, optimizer)
    # Nothing was lost: the next batch trains.
    booster.backward(loss_of(model, 2), optimizer)
    optimizer.step()
    expected = kit.fit(Net(), lambda model, step: loss_of(model, step + 1), steps=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.weights[name]), name


def test_two_losses_of_one_step_may_share_a_graph(kit: Any) -> None:
    # Between them nothing is rewritten: the same graph twice is as good as once with twice the loss, divided by two micro-batches.
    booster, model, optimizer = kit.boosted(
        Net(), precision="fp32", micro_batch_size=None, seq_len=None, gradient_accumulation_steps=2, **STREAMED
    )
    loss = loss_of(model, 0)
    booster.backward(loss, optimizer, retain_graph=True)
    booster.backward(loss, optimizer)
    optimizer.step()
    expected = kit.fit(Net(), loss_of, steps=1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.weights[name], rtol=1e-5, atol=1e-6)


def test_state_dict_gathers_and_full_parameters_lends(kit: Any) -> None:
    booster, model, _ = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, **STREAMED)
    fresh = {name: value.clone() for name, value in Net().state_dict().items()}
    loss_of(model, 0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh[name])
    for name, value in model.blocks.state_dict().items():
        assert torch.equal(value, fresh[f"blocks.{name}"])
    reference = Net()
    with tierwise.full_parameters(model):
        inside = loss_of(model, 0)
        assert torch.equal(inside, loss_of(reference, 0))
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                mine.mul_(0.5)
                theirs.mul_(0.5)
    assert model.blocks[1].up.weight.isnan().all()
    assert torch.equal(model.state_dict()["blocks.1.up.weight"], fresh["blocks.1.up.weight"] * 0.5)
    assert any(chunk["slot"] is not None for chunk in booster._runtime.residency())
    assert loss_of(model, 0).item() == loss_of(reference, 0).item(), "a clean copy in a slot has to follow"
    other = {name: value + 1 for name, value in fresh.items()}
    model.load_state_dict(other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other[name])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_buffers_keep_their_dtype_and_stay_real_when_lazy(kit: Any) -> None:
    eager = kit.llama()
    expected = {name: buffer.clone() for name, buffer in eager.named_buffers()}
    _, model, _ = kit.boosted(eager, precision="bf16", **STREAMED)
    with tierwise.lazy_init():
        lazy = kit.llama()
    assert all(param.is_meta for param in lazy.parameters())
    for boosted in (model, lazy):
        for name, buffer in boosted.named_buffers():
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, expected[name]), name


def test_saved_tensors_are_freed_without_the_garbage_collector(kit: Any) -> None:
    class SavesItsOutput(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids).tanh()  # Where pack returns this very tensor, it keeps itself alive.

    booster, model, _ = kit.boosted(SavesItsOutput(), precision="fp32", micro_batch_size=None, seq_len=None)
    gc.collect()
    gc.disable()
    try:
        loss = loss_of(model, 0)
        assert booster.stats()["activation_bytes"] > 0
        del loss
        assert booster.stats()["activation_bytes"] == 0
    finally:
        gc.enable()
