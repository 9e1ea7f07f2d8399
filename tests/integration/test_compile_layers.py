"""`compile_layers`: the same training to rounding, and the plan counts what compiled layers save."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from tests.support.traps import STREAMED
from tierwise.gemini.compiled import LayerCompiler
from tierwise.gemini.search import PlanSearch

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # torch 2.11 warns of its own code when its compiler is imported.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _without_a_code_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's division into forward and backward, without its kernels, which need a C++ compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(LayerCompiler, "backend", "aot_eager_decomp_partition")


@pytest.mark.parametrize("options", [{}, STREAMED, {**STREAMED, "recompute": "full"}], ids=["resident", "streamed", "recomputed"])
def test_the_same_training(kit: Any, options: dict[str, Any]) -> None:
    plain = kit.train(kit.llama(), steps=4, precision="fp32")
    compiled = kit.train(kit.llama(), steps=4, precision="fp32", compile_layers=True, **options)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_compiled_model_is_freed(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(kit.llama(), precision="fp32", compile_layers=True)
    ids = kit.batches(1)[0]
    booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
    optimizer.step()
    held = weakref.ref(booster._runtime), weakref.ref(model)
    del booster, model, optimizer
    gc.collect()
    assert [found() for found in held] == [None, None]


def test_a_model_without_layers_stays_as_it_is(kit: Any) -> None:
    model = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="compile_layers=True, but the model has no layers"):
        kit.boosted(model, micro_batch_size=None, seq_len=None, compile_layers=True)
    kit.boosted(model, micro_batch_size=None, seq_len=None)


@pytest.mark.parametrize("thrifty", [False, True], ids=["kept", "made again"])
def test_the_plan_counts_what_compiled_layers_save(kit: Any, monkeypatch: pytest.MonkeyPatch, thrifty: bool) -> None:
    monkeypatch.setattr(PlanSearch, "variants", lambda self, trace: [trace.rematerialized(1.0) if thrifty else trace])
    options: dict[str, Any] = {
        "precision": "bf16",
        "micro_batch_size": 4,
        "seq_len": 64,
        "recompute": "none",
        "gradient_accumulation_steps": 1,
    }
    booster, model, optimizer = kit.boosted(kit.llama(), compile_layers=True, **options)
    ids = torch.randint(0, kit.VOCAB, (4, 64), generator=torch.Generator().manual_seed(1))
    booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
    optimizer.step()
    stats = booster.stats()
    assert stats["activation_peak_bytes"] <= 1.01 * stats["planned_activation_bytes"]
    assert stats["activation_peak_bytes"] >= 0.9 * stats["planned_activation_bytes"]
    eager, _, _ = kit.boosted(kit.llama(), **options)
    assert stats["planned_activation_bytes"] < 0.8 * eager.stats()["planned_activation_bytes"]
