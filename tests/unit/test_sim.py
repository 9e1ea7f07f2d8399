"""`tierwise.simulate` and `tierwise.search`: typed results, readable errors, no torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tierwise
from tierwise.sim import SearchResult, Shortage, Simulation


def test_a_step_that_fits() -> None:
    result = tierwise.simulate("llama2-7b", micro_batch_size=4, device_budget="80GB")
    assert isinstance(result, Simulation) and result.fits
    assert result.num_params == 6_738_415_616
    parts = result.compute_s + result.slowdown_s + sum(dataclasses.astuple(result.stalls))
    assert parts == pytest.approx(result.step_s, rel=1e-12)
    assert 0 < result.mfu <= result.hfu < 1
    assert result.device_peak_bytes <= 80_000_000_000


def test_a_step_that_does_not_fit_says_what_would() -> None:
    result = tierwise.simulate("llama2-7b", micro_batch_size=4, device_budget="5GB", host_budget="200GB")
    assert isinstance(result, Shortage) and not result.fits
    assert (result.tier, result.shortfall_bytes > 0) == ("device", True)
    assert result.alternatives


def test_several_gpus_and_other_systems() -> None:
    ours = tierwise.simulate("llama2-7b", hardware="dgx-h100", gpus=8, tokens_per_step=131_072, micro_batch_size=2)
    theirs = tierwise.simulate("llama2-7b", hardware="dgx-h100", gpus=8, tokens_per_step=131_072, micro_batch_size=2, policy="zero3")
    assert isinstance(ours, Simulation) and isinstance(theirs, Simulation)
    assert (ours.data_parallel, ours.accumulation, theirs.policy) == (8, 2, "zero3")


def test_search() -> None:
    found = tierwise.search("llama2-7b", tokens_per_step=16_384)
    assert isinstance(found, SearchResult)
    assert found.flags.startswith("--micro-batch") and 0 < found.fitting <= found.tried
    alone = tierwise.simulate("llama2-7b", tokens_per_step=16_384, micro_batch_size=1)
    assert isinstance(alone, Simulation) and found.best.step_s <= alone.step_s


def test_mistakes_are_value_errors_with_values() -> None:
    with pytest.raises(ValueError, match=r"unknown model `llama9`.*known are llama-1.35b"):
        tierwise.simulate("llama9")
    with pytest.raises(ValueError, match="gpus is 8; it must be a multiple of tensor-parallel 3"):
        tierwise.simulate("llama2-7b", hardware="dgx-h100", gpus=8, tensor_parallel=3)
    with pytest.raises(ValueError, match="h100 has no network"):
        tierwise.simulate("llama2-7b", gpus=2)


def test_any_config_file(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}))
    result = tierwise.simulate(config, seq=64)
    assert isinstance(result, Simulation)
    assert result.num_params == 128 * 64 + 64 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64


def test_simulating_imports_no_torch() -> None:
    code = "import sys, tierwise; tierwise.simulate('llama2-7b'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
