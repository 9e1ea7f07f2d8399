"""`accumulate_dtype="bf16"`: gradients of micro-batches added up as torch adds them into `.grad`, wherever that happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tierwise import BudgetError

ACCUMULATION = 4
OPTIONS: dict[str, Any] = {"precision": "bf16", "gradient_accumulation_steps": ACCUMULATION, "max_norm": 0.4}
STATIC_HOST: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "host": {**STATIC_HOST, "accumulate_on": "host"},
    "streamed": {**STATIC_HOST, "accumulate_on": "host", "offload_param_frac": 1.0},
    "sums on the device": {**STATIC_HOST, "accumulate_on": "device", "offload_param_frac": 0.5},
    "states visit the device": {**STATIC_HOST, "stream_optim_frac": 1.0},
    "speculating": {**STATIC_HOST, "clip_mode": "speculate"},
    "on a disk": {**STATIC_HOST, "nvme_budget": "64MiB"},
}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_every_placement_gives_the_same_bits(kit: Any, placement: dict[str, Any], tmp_path: Path) -> None:
    if "nvme_budget" in placement:
        with pytest.raises(BudgetError) as caught:
            kit.boosted(kit.llama(), accumulate_dtype="bf16", nvme_path=tmp_path, host_budget=1000, **OPTIONS, **placement)
        placement = {**placement, "nvme_path": tmp_path, "host_budget": caught.value.needed_bytes}
    reference = kit.train(kit.llama(), steps=6, accumulate_dtype="bf16", **OPTIONS)
    result = kit.train(kit.llama(), steps=6, accumulate_dtype="bf16", **OPTIONS, **placement)
    result.same_as(reference)
    classes = {chunk["class"] for chunk in result.booster.plan()["chunks"]}
    assert ("nvme" in classes) == ("nvme_path" in placement)
    if "nvme_path" in placement:
        assert {chunk["accumulate"] for chunk in result.booster.plan()["chunks"]} == {"nvme"}
    assert classes != {"device"}


def test_sums_are_those_of_torch(kit: Any) -> None:
    def model_in(dtype: torch.dtype) -> Any:
        """Weights are the same, buffers stay as they are."""
        model = kit.llama()
        for param in model.parameters():
            param.data = param.data.to(torch.bfloat16).to(dtype)
        return model

    def norm_of(dtype: str) -> float:
        trained = kit.train(model_in(torch.float32), steps=1, synchronous=True, accumulate_dtype=dtype, fused_loss=False, **OPTIONS)
        return float(trained.norms[0])

    model = model_in(torch.bfloat16)
    for ids in kit.batches(ACCUMULATION):
        (model(input_ids=ids, labels=ids, use_cache=False).loss / ACCUMULATION).backward()
    expected = sum(float(param.grad.double().pow(2).sum()) for param in model.parameters()) ** 0.5
    assert norm_of("bf16") == pytest.approx(expected, rel=1e-6)
    assert norm_of("fp32") != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("where", "tier"), [("host", "host"), ("device", "device")])
def test_they_take_half_the_memory(kit: Any, where: str, tier: str) -> None:
    def held(dtype: str) -> int:
        booster, _, _ = kit.boosted(kit.llama(), **OPTIONS, **STATIC_HOST, accumulate_on=where, accumulate_dtype=dtype)
        sizes = booster.plan()[tier]
        return int(sizes["gradients"] if tier == "host" else sizes["accumulators"])

    assert 0 < held("bf16") <= 0.53 * held("fp32")


def test_only_gradients_in_bf16_can_be_added_up_in_bf16(kit: Any) -> None:
    with pytest.raises(ValueError, match="accumulate_dtype='bf16' needs gradients in bf16, and precision='fp16'"):
        kit.plugin(precision="fp16", accumulate_dtype="bf16")
