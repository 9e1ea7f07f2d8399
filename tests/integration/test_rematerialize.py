"""Outputs of cheap kernels that backward makes again: fewer bytes, the same bits. The kernels are stand-ins that run on a CPU."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch import Tensor

from tierwise.gemini.model_trace import ModelTrace
from tierwise.gemini.search import PlanSearch
from tierwise.kernels import fused
from tierwise.kernels.rematerialize import Recipe, Rematerialized, attach, recipe_of

made = {"norm": 0, "product": 0}


class _Norm(torch.autograd.Function):
    """RMSNorm with liger's signature; saves what liger's kernel saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, *rest: Any) -> Tensor:
        made["norm"] += 1
        scale = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
        ctx.save_for_backward(x, weight, scale)
        # A view of what the kernel wrote, as liger's.
        return ((x.float() * scale.unsqueeze(-1)).to(x.dtype) * weight).view(-1, x.shape[-1]).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, scale = ctx.saved_tensors
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
            out = (x.float() * scale).to(x.dtype) * weight
            found = torch.autograd.grad(out, [x, weight], grads[0])
        return (*found, None, None, None, None)


class _Product(torch.autograd.Function):
    """SwiGLU with liger's signature."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        made["product"] += 1
        ctx.save_for_backward(gate, up)
        return (torch.nn.functional.silu(gate) * up).view(-1, gate.shape[-1]).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            return torch.autograd.grad(torch.nn.functional.silu(gate) * up, [gate, up], grads[0])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs: dict[str, dict[str, Any]] = {
        "rms_norm": {"LigerRMSNormFunction": _Norm},
        "swiglu": {"LigerSiLUMulFunction": _Product},
        "rope": {"LigerRopeFunction": None},
    }
    for name, members in stubs.items():
        module = types.ModuleType(f"liger_kernel.ops.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fused, "liger_is_available", lambda: True)
    monkeypatch.setattr(fused, "_runs", lambda tensor, kernel: True)


FUSED = {"enable_fused_normalization": True, "enable_jit_fused": True}
STREAMED = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}


@pytest.mark.parametrize("placement", [{}, STREAMED], ids=["resident", "streamed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fewer_bytes_and_the_same_bits(
    kit: Any, kernels: None, monkeypatch: pytest.MonkeyPatch, placement: dict[str, Any], accumulation: int
) -> None:
    options = {
        "precision": "bf16",
        "gradient_accumulation_steps": accumulation,
        "max_norm": 0.4,
        "rematerialize": True,
        **FUSED,
        **placement,
    }
    monkeypatch.setattr(PlanSearch, "variants", lambda self, trace: [trace])
    made.update(norm=0, product=0)
    kept = kit.train(kit.llama(), steps=6, **options)
    before = dict(made)
    monkeypatch.setattr(PlanSearch, "variants", lambda self, trace: [trace.rematerialized(1.0)])
    again = kit.train(kit.llama(), steps=6, **options)
    again.same_as(kept)
    for kernel, count in before.items():
        # Each output is made once in forward and once more in backward, whoever shares it.
        assert made[kernel] - before[kernel] > count, kernel
        assert made[kernel] - before[kernel] <= 2 * count, kernel
    fewer, more = (result.booster.stats()["activation_peak_bytes"] for result in (again, kept))
    cheap = kept.booster._runtime.trace.cheap_bytes
    assert cheap > 0.2 * more
    assert fewer <= more - 0.9 * cheap
    runtime = again.booster._runtime
    assert fewer == runtime.trace.activation_peak_bytes(runtime.planned.plan["activations"])
    assert "are made again in backward" in again.booster.explain()
    assert "are made again in backward" not in kept.booster.explain()


def test_the_planner_makes_them_again_where_memory_is_short(kit: Any, kernels: None) -> None:
    options = {"precision": "bf16", "micro_batch_size": 8, "gradient_accumulation_steps": 1, **FUSED}

    def step(**more: Any) -> tuple[Any, float]:
        booster, _, _ = kit.boosted(kit.llama(), **options, **more)
        ids = kit.batches(1, rows=8)[0]
        return booster, booster.train_step({"input_ids": ids, "labels": ids}).item()

    roomy, loss = step()
    assert not roomy._runtime.saved.rematerialize, "with room for everything it would only cost time"
    # Without it whole layers would have to be recomputed; the host can take nothing.
    budget = sum(roomy.plan()["device"].values()) - roomy._runtime.trace.cheap_bytes // 2
    short, same = step(device_budget=budget, host_budget=4096)
    assert short._runtime.saved.rematerialize
    assert not any(short._runtime.recompute)
    assert same == loss
    none, _ = step(rematerialize=False)
    assert none._runtime.search.variants(none._runtime.trace) == [none._runtime.trace]


def test_what_shares_a_recipe_makes_it_once_per_backward() -> None:
    count = []
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(4, 4, requires_grad=True)

    def make() -> Tensor:
        count.append(1)
        return x.detach() * 2

    def pack(tensor: Tensor) -> Any:
        recipe = recipe_of(tensor)
        return tensor.detach() if recipe is None else Rematerialized.of(tensor, recipe)

    def unpack(packed: Any) -> Tensor:
        return packed.tensor() if isinstance(packed, Rematerialized) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output = attach(x * 2, Recipe(make, 0))
        loss = (output @ weight).sum() + (output.view(2, 6)[:, 1:5] @ weight).sum()
    first = torch.autograd.grad(loss, [x, weight], retain_graph=True)
    assert len(count) == 1
    second = torch.autograd.grad(loss, [x, weight])
    assert len(count) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plain = x * 2
    expected = torch.autograd.grad((plain @ weight).sum() + (plain.view(2, 6)[:, 1:5] @ weight).sum(), [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))


def test_a_trace_knows_both_variants() -> None:
    from tierwise.gemini.model_trace import UnitTrace

    trace = ModelTrace(
        [0], [UnitTrace(saved_bytes=100, input_bytes=10, flops=30.0, cheap_bytes=40, cheap_traffic_bytes=90)], [(0, "forward")], 0, 8, True
    )
    again = trace.rematerialized(2.0)
    assert (again.units[0].saved_bytes, again.units[0].extra_flops, again.flops()) == (60, 60.0, 30.0)


@pytest.mark.parametrize("again", [False, True])
def test_the_model_is_freed(kit: Any, kernels: None, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    monkeypatch.setattr(PlanSearch, "variants", lambda self, trace: [trace.rematerialized(1.0) if again else trace])
    result = kit.train(kit.llama(), steps=2, precision="bf16", **FUSED)
    runtime = weakref.ref(result.booster._runtime)
    del result
    gc.collect()
    assert runtime() is None
