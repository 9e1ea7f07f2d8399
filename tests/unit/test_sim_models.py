"""The simulator's models against transformers on the meta device: parameters and FLOPs are exact."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode


def presets() -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tierwise.sim", "models", "--format", "json"]
    listed: list[dict[str, Any]] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["models"]
    return listed


PRESETS = presets()
# Models of few layers are as good a check of the FLOPs and take a moment instead of a minute.
SMALLEST = {preset["config"]["model_type"]: preset for preset in reversed(PRESETS)}


def build(preset: dict[str, Any]) -> Any:
    fields = dict(preset["config"])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model: torch.nn.Module = getattr(transformers, preset["class"])(config)
    return model


def test_every_family_is_there() -> None:
    assert sorted(SMALLEST) == ["bert", "bloom", "glm", "glm4", "gpt2", "llama", "opt", "t5"]
    assert len(PRESETS) == len({preset["name"] for preset in PRESETS}) > 40


@pytest.mark.parametrize("preset", PRESETS, ids=[preset["name"] for preset in PRESETS])
def test_parameters_are_exact(preset: dict[str, Any]) -> None:
    model = build(preset)
    assert sum(p.numel() for p in model.parameters()) == preset["num_params"]


@pytest.mark.parametrize("preset", SMALLEST.values(), ids=SMALLEST)
def test_flops_of_matrix_products_are_exact(preset: dict[str, Any]) -> None:
    model = build(preset)
    model.config.use_cache = False
    # Whether all of a mask is set cannot be read on the meta device; eager attention does not ask.
    model.set_attn_implementation("eager")
    tokens = torch.zeros(1, 128, dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens}
    if preset["config"]["model_type"] == "t5":
        inputs["decoder_input_ids"] = tokens
    if preset["config"]["model_type"] in ("glm", "glm4", "gpt2", "llama"):
        # A finished mask: to build one, transformers looks at values.
        inputs["attention_mask"] = torch.zeros(1, 1, 128, 128, device="meta")
    # Attention's products are batched, so `mm` and `addmm` are the layers' own.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**inputs)
    by_operation = counter.get_flop_counts()["Global"]
    products = sum(flops for operation, flops in by_operation.items() if str(operation) in ("aten.mm", "aten.addmm"))
    assert products == 128 * preset["forward_matmul_flops_per_token"]
