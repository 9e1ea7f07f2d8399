"""`torch.compile` around, inside and instead of units."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.support.traps import STREAMED, Net, loss_of

# torch asks every tensor that it guards for its `.grad`, and warns itself about that.
compiling = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@compiling
@pytest.mark.parametrize("what", ["block", "linear"])
def test_compiled_blocks_recompile_nothing_when_slots_move(kit: Any, what: str) -> None:
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def build(compiled: bool) -> Net:
        net = Net(blocks=6)
        for block in net.blocks if compiled else ():
            (block if what == "block" else block.up).compile(backend=backend)
        return net

    plain = kit.fit(build(False), loss_of)
    torch._dynamo.reset()
    kit.plain_fit(build(True), loss_of, steps=2)
    unboosted, graphs = graphs, 0
    torch._dynamo.reset()
    streamed = kit.fit(build(True), loss_of, steps=2, **STREAMED)
    first = graphs
    assert first == unboosted, "hooks are not part of what is compiled"
    # torch 2.11 does not compile a layer of torch's own by itself.
    assert first > 0 or what == "linear"
    for step in range(2, 6):
        loss = loss_of(streamed.model, step)
        streamed.losses.append(loss.item())
        streamed.booster.backward(loss, streamed.optimizer)
        streamed.optimizer.step()
    assert graphs == first
    assert streamed.losses == plain.losses


@compiling
@pytest.mark.parametrize("how", ["layer.compile()", "torch.compile(layer)", "layer.forward"])
def test_compiled_layers(kit: Any, how: str) -> None:
    torch._dynamo.reset()
    plain = kit.train(kit.llama(), steps=4, precision="fp32")
    model = kit.llama()
    layer: Any
    for index, layer in enumerate(model.model.layers):
        if how == "layer.compile()":
            layer.compile(backend="aot_eager")
        elif how == "torch.compile(layer)":
            model.model.layers[index] = torch.compile(layer, backend="aot_eager")
        else:
            layer.forward = torch.compile(layer.forward, backend="aot_eager")
    for options in (STREAMED, {**STREAMED, "recompute": "full"}):
        compiled = kit.train(copy.deepcopy(model) if how != "layer.forward" else model, steps=4, precision="fp32", **options)
        assert compiled.losses == pytest.approx(plain.losses, rel=1e-6)
        if how == "layer.forward":
            break


# torch 2.11's inductor uses a deprecated part of torch.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"options": {"triton.cudagraphs": True}}])
@pytest.mark.parametrize("how", ["block.compile()", "torch.compile(block)", "block.forward"])
def test_cuda_graphs_are_refused(kit: Any, how: str, options: dict[str, Any]) -> None:
    def build(options: dict[str, Any]) -> Net:
        net = Net()
        block: Any = net.blocks[1]
        if how == "block.compile()":
            block.compile(**options)
        elif how == "torch.compile(block)":
            net.blocks[1] = torch.compile(block, **options)
        else:
            block.forward = torch.compile(block.forward, **options)
        return net

    with pytest.raises(ValueError, match=r"blocks\.1.* compiled with CUDA graphs"):
        kit.boosted(build(options))
    kit.boosted(build({"mode": "max-autotune-no-cudagraphs"}), micro_batch_size=None, seq_len=None)
