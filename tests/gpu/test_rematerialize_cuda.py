"""On CUDA liger's kernels make normalizations and gated products again in backward: fewer bytes, the same bits."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Read once, when cuBLAS starts.
pytest.importorskip("torch", reason="needs torch: install tierwise[train]")
pytest.importorskip("transformers", reason="needs transformers: install tierwise[train]")

import torch

from tests.gpu.llama import boosted, ids_of, small_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FUSED: dict[str, Any] = {"enable_fused_normalization": True, "enable_jit_fused": True}


def run(steps: int = 4, **options: Any) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    torch.use_deterministic_algorithms(True)
    try:
        booster, model, optimizer = boosted(small_llama(), max_norm=0.5, recompute="none", **FUSED, **options)
        losses = []
        for step in range(steps):
            ids = ids_of(step)
            loss = model(input_ids=ids, labels=ids).loss
            booster.backward(loss, optimizer)
            optimizer.step()
            losses.append(loss.detach())
        weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        return [float(loss) for loss in losses], weights, booster
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "options",
    [{}, {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}],
    ids=["resident", "streamed"],
)
def test_fewer_bytes_and_the_same_bits(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    pytest.importorskip("liger_kernel", reason="needs liger-kernel, whose kernels have the recipes")
    from tierwise.gemini.search import PlanSearch

    kept, theirs, plain = run(rematerialize=False, **options)
    monkeypatch.setattr(PlanSearch, "variants", lambda self, trace: [trace.rematerialized(1.0)])
    again, ours, booster = run(**options)
    assert again == kept
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name
    assert "are made again in backward" in booster.explain()
    assert "are made again in backward" not in plain.explain()
    saved, before = booster.plan()["device"]["activations"], plain.plan()["device"]["activations"]
    assert saved < 0.85 * before, (saved, before)
