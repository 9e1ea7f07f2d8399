"""On CUDA, under deterministic algorithms, losses and weights do not depend on where chunks live."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Read once, when cuBLAS starts.
pytest.importorskip("torch", reason="needs torch: install tierwise[train]")
pytest.importorskip("transformers", reason="needs transformers: install tierwise[train]")

import torch

from tests.gpu.llama import boosted, ids_of, small_llama
from tierwise import BudgetError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = {1: 8, 4: 3}
"""Optimizer steps by micro-batches per step: a wrong bit shows in the next loss."""


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def train(
    precision: str, accumulation: int, max_norm: float | None, model: Any = None, **options: Any
) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    booster, model, optimizer = boosted(
        model or small_llama(), precision=precision, max_norm=max_norm, gradient_accumulation_steps=accumulation, **options
    )
    losses = []
    for step in range(STEPS[accumulation]):
        for micro in range(accumulation):
            ids = ids_of(step * accumulation + micro)
            loss = model(input_ids=ids, labels=ids).loss
            booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    return [float(loss) for loss in losses], weights, booster.stats()


@functools.cache
def everything_on_the_device(precision: str, accumulation: int, max_norm: float | None) -> tuple[list[float], dict[str, Any]]:
    """Losses and weights that every other placement has to give."""
    losses, weights, _ = train(precision, accumulation, max_norm, placement_policy="static")
    return losses, weights


STATIC = {"placement_policy": "static", "offload_optim_frac": 1.0}
OFFLOADED = {"recompute": "none", "offload_activations": "full"}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "again": {"placement_policy": "static"},
    "host optimizer": STATIC,
    "half and half": {"placement_policy": "static", "offload_optim_frac": 0.5},
    "streamed": {**STATIC, "offload_param_frac": 1.0},
    "streamed, recomputed": {**STATIC, "offload_param_frac": 1.0, "recompute": "full"},
    "activations kept": {"placement_policy": "static", "recompute": "none", "offload_activations": "none"},
    "activations offloaded": {"placement_policy": "static", **OFFLOADED},
    "activations offloaded, streamed": {**STATIC, **OFFLOADED, "offload_param_frac": 1.0},
    "states visiting": {**STATIC, "stream_optim_frac": 1.0},
    "states visiting beside the CPU": {**STATIC, "stream_optim_frac": 0.5, "recompute": "full"},
    "states visiting, speculate": {**STATIC, "stream_optim_frac": 0.4, "offload_param_frac": 0.3, "clip_mode": "speculate"},
    "one thread": {**STATIC, "num_threads": 1},
    "two threads": {**STATIC, "num_threads": 2},
    "speculate": {**STATIC, "clip_mode": "speculate"},
    "auto clip": {**STATIC, "clip_mode": "auto"},
}
EVERY_MECHANISM = (
    "host optimizer",
    "half and half",
    "streamed, recomputed",
    "activations offloaded, streamed",
    "states visiting beside the CPU",
    "speculate",
)
ANY_CLIPPING = ("host optimizer", "states visiting, speculate", "speculate", "auto clip")
"""Where nothing is clipped, what differs is whether that was known before."""


@pytest.mark.parametrize(
    ("precision", "accumulation", "max_norm", "names"),
    [
        ("bf16", 1, 0.5, tuple(PLACEMENTS)),
        ("fp32", 1, 0.5, tuple(PLACEMENTS)),
        ("bf16", 4, 0.5, tuple(PLACEMENTS)),
        ("fp32", 4, 0.5, EVERY_MECHANISM),
        *((precision, accumulation, None, EVERY_MECHANISM) for precision in ("bf16", "fp32") for accumulation in (1, 4)),
        *((precision, 1, 100.0, ANY_CLIPPING) for precision in ("bf16", "fp32")),
    ],
    ids=lambda value: f"{len(value)} placements" if isinstance(value, tuple) else None,
)
def test_placement_changes_nothing(precision: str, accumulation: int, max_norm: float | None, names: tuple[str, ...]) -> None:
    losses, weights = everything_on_the_device(precision, accumulation, max_norm)
    for name in names:
        got, theirs, stats = train(precision, accumulation, max_norm, **PLACEMENTS[name])
        assert got == losses, name
        for key, value in weights.items():
            assert torch.equal(value, theirs[key]), (name, key)
        if "streamed" in name:
            assert stats["fetches"] > 0
        assert (stats["states_visited_bytes"] > 0) == ("visiting" in name)
        if "offloaded" in name:
            assert 0 < stats["activation_in_bytes"] <= stats["activation_out_bytes"]
            assert stats["offload_kept_bytes"] == stats["host_activation_bytes"] == 0
        if max_norm == 0.5:
            assert stats["clipped"] > 0


@pytest.mark.parametrize("where", ["host", "device"])
def test_sums_in_bf16_are_the_same_everywhere(where: str) -> None:
    losses, weights, _ = train("bf16", 4, 0.5, placement_policy="static", accumulate_dtype="bf16")
    got, theirs, _ = train("bf16", 4, 0.5, **STATIC, accumulate_on=where, accumulate_dtype="bf16")
    assert got == losses
    for key, value in weights.items():
        assert torch.equal(value, theirs[key]), key
    others, _ = everything_on_the_device("bf16", 4, 0.5)
    assert others != losses


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("accumulation", "max_norm"), [(1, None), (1, 0.5), (4, 0.5)])
def test_the_disk_changes_nothing(precision: str, accumulation: int, max_norm: float | None, tmp_path: Path) -> None:
    """Moments and low halves, and parameters too, in a spill file. Skipped where pytest's directory is in memory."""
    losses, weights = everything_on_the_device(precision, accumulation, max_norm)
    # Measuring the disk takes longer than training.
    spilling = {**STATIC, "nvme_path": tmp_path, "nvme_read_bytes_per_second": 2.5e9, "nvme_write_bytes_per_second": 2e9}
    try:
        with pytest.raises(BudgetError) as caught:
            train(precision, accumulation, max_norm, **spilling, host_budget=1000)
    except ValueError as error:
        pytest.skip(str(error))
    everything = caught.value.needed_bytes
    params = sum(value.numel() * value.element_size() for name, value in weights.items()) * 11 // 10
    variants: dict[str, tuple[dict[str, Any], str]] = {
        "everything": ({"host_budget": everything}, "spilled"),
        "moments and low halves": ({"host_budget": everything + params}, "resident"),
        "streamed": ({"host_budget": everything + params, "offload_param_frac": 1.0}, "streamed"),
        "speculating": ({"host_budget": (everything + params) * 3 // 2, "clip_mode": "speculate"}, "resident"),
    }
    for name, (options, home) in variants.items():
        got, theirs, stats = train(precision, accumulation, max_norm, **{**spilling, **options})
        assert got == losses, name
        for key, value in weights.items():
            assert torch.equal(value, theirs[key]), (name, key)
        assert stats["nvme_written_bytes"] > 0, name
        assert stats["host_peak_bytes"] <= stats["host_budget_bytes"], name
        assert stats["nvme_payload_bytes"] * (STEPS[accumulation] * 3 // 4) <= stats["nvme_written_bytes"], (name, home)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_is_frozen_streams_from_the_disk(precision: str, tmp_path: Path) -> None:
    def frozen() -> Any:
        model = small_llama()
        for layer in model.model.layers:
            layer.mlp.requires_grad_(False)
        return model

    losses, weights, _ = train(precision, 1, 0.5, frozen(), placement_policy="static")
    speeds = {"nvme_read_bytes_per_second": 2.5e9, "nvme_write_bytes_per_second": 2e9}
    spilling = {**STATIC, "offload_param_frac": 1.0, "nvme_path": tmp_path, **speeds}
    try:
        with pytest.raises(BudgetError) as caught:
            train(precision, 1, 0.5, frozen(), **spilling, host_budget=1000)
    except ValueError as error:
        pytest.skip(str(error))
    got, theirs, stats = train(precision, 1, 0.5, frozen(), **spilling, host_budget=caught.value.needed_bytes)
    assert got == losses
    for key, value in weights.items():
        assert torch.equal(value, theirs[key]), key
    assert stats["nvme_fetched_bytes"] > 0
    assert stats["host_peak_bytes"] <= stats["host_budget_bytes"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_budget_is_kept(precision: str) -> None:
    # The tightest budget that the planner names, with room for what cuBLAS takes in deterministic mode.
    losses, weights = everything_on_the_device(precision, 1, 0.5)
    # Workspaces of threads and streams of the tests before are not this model's.
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() < 1 << 20, torch.cuda.memory_summary()
    with pytest.raises(BudgetError) as caught:
        boosted(small_llama(), precision=precision, max_norm=0.5, device_budget=1, reserve="96MB")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    budget = caught.value.needed_bytes
    got, theirs, stats = train(precision, 1, 0.5, device_budget=budget, reserve="96MB")
    assert torch.cuda.max_memory_reserved() <= budget
    assert stats["evictions"] > 0
    assert got == losses
    assert all(torch.equal(value, theirs[key]) for key, value in weights.items())
    gc.collect()
    # The limit goes with the model.
    torch.empty(2 * budget, dtype=torch.uint8, device="cuda")


def test_segments_of_the_allocator_grow() -> None:
    # Plans keep less free where they do.
    booster, _model, _optimizer = boosted(small_llama(), placement_policy="static")
    torch.cuda.empty_cache()
    large = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    segments = [s for s in torch.cuda.memory_snapshot() if s["address"] <= large.data_ptr() < s["address"] + s["total_size"]]
    assert [s["is_expandable"] for s in segments] == [booster._runtime.target.expandable]


def test_offloaded_activations_leave_the_device() -> None:
    peaks = {}
    for name, how in (("kept", {"recompute": "none", "offload_activations": "none"}), ("offloaded", OFFLOADED)):
        booster, model, optimizer = boosted(small_llama(layers=12), placement_policy="static", **how)
        gc.collect()
        for step in range(3):
            if step == 1:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            loss = model(input_ids=ids_of(step), labels=ids_of(step)).loss
            booster.backward(loss, optimizer)
            optimizer.step()
            booster.flush()
        peaks[name] = torch.cuda.max_memory_allocated() - held
        saved = sum(unit.offload_bytes for unit in booster._runtime.trace.units)
        window = booster._runtime.planned.plan["offload_window_bytes"]
        del booster, model, optimizer, loss
        gc.collect()
    # Of twelve layers two are on the device, and some of what autograd computes with.
    assert peaks["offloaded"] < peaks["kept"] - saved // 2 + window, peaks


def test_agrees_with_plain_adamw() -> None:
    losses, _, _ = train("fp32", 1, 0.5, **STATIC)
    model = small_llama().cuda()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, expected in enumerate(losses):
        ids = ids_of(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
