"""On CUDA Python runs ahead of the device. Whatever it decides early, copies and steps wait for the kernels that are still to come."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Read once, when cuBLAS starts.
pytest.importorskip("torch", reason="needs torch: install tierwise[train]")
pytest.importorskip("transformers", reason="needs transformers: install tierwise[train]")

import torch

from tests.gpu.llama import boosted, ids_of, small_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STATIC: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0}
STREAMED = {**STATIC, "offload_param_frac": 1.0}
VISITING = {**STATIC, "stream_optim_frac": 1.0}
OFFLOADED: dict[str, Any] = {"recompute": "none", "offload_activations": "full"}
CYCLES = 2_000_000
"""About a millisecond: longer than all copies of a layer take."""


class _SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(CYCLES)
        return grad


def lag(model: Any) -> None:
    """Makes the device late in every layer: after its chunks are asked for, before they are read."""

    def before(module: Any, args: Any, output: Any) -> torch.Tensor:
        torch.cuda._sleep(CYCLES)
        return _SlowBackward.apply(output)

    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(before)


def run(slow: bool, steps: int = 4, accumulation: int = 1, **options: Any) -> tuple[list[float], dict[str, torch.Tensor], dict[str, Any]]:
    torch.use_deterministic_algorithms(True)
    try:
        model = small_llama(layers=8)
        if slow:
            lag(model)
        booster, model, optimizer = boosted(model, max_norm=0.5, gradient_accumulation_steps=accumulation, **options)
        losses = []
        for step in range(steps * accumulation):
            ids = ids_of(step)
            loss = model(input_ids=ids, labels=ids).loss
            booster.backward(loss, optimizer)
            optimizer.step()
            losses.append(loss.detach())
        weights = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        return [float(loss) for loss in losses], weights, booster.stats()
    finally:
        torch.use_deterministic_algorithms(False)


@functools.cache
def in_time(accumulation: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a device that is not late."""
    losses, weights, _ = run(slow=False, accumulation=accumulation, placement_policy="static")
    return losses, weights


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        STATIC,
        STREAMED,
        {**STREAMED, "recompute": "full"},
        {**STREAMED, "clip_mode": "speculate"},
        {"placement_policy": "static"},
        {"placement_policy": "static", **OFFLOADED},
        {**STREAMED, **OFFLOADED},
        VISITING,
        {**STATIC, "stream_optim_frac": 0.5, "recompute": "full"},
        {**STATIC, "stream_optim_frac": 0.4, "offload_param_frac": 0.3, "clip_mode": "speculate"},
    ],
    ids=[
        "host",
        "streamed",
        "recomputed",
        "speculating",
        "device",
        "offloaded",
        "streamed and offloaded",
        "visiting",
        "visiting beside the CPU",
        "visiting, speculating",
    ],
)
def test_a_late_device_reads_what_was_meant_for_it(options: dict[str, Any], accumulation: int) -> None:
    losses, weights = in_time(accumulation)
    got, theirs, stats = run(slow=True, accumulation=accumulation, **options)
    assert got == losses
    for name, value in weights.items():
        assert torch.equal(value, theirs[name]), name
    if options.get("offload_param_frac"):
        # Whether a slot is taken from a chunk that is still needed, or from one that the host rewrites, is a matter of timing.
        assert stats["fetches"] > 0
    assert (stats["states_visited_bytes"] > 0) == ("stream_optim_frac" in options)
    if "offload_activations" in options:
        assert stats["activation_in_bytes"] > 0


def test_a_late_device_and_other_streams() -> None:
    # The engine waits for the stream that is current when a unit runs, whichever that is.
    losses, weights = in_time()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got, theirs, _ = run(slow=True, **STREAMED, **OFFLOADED)
    assert got == losses
    assert all(torch.equal(value, theirs[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    "options", [STATIC, STREAMED, {**STREAMED, **OFFLOADED}, VISITING], ids=["host", "streamed", "offloaded", "visiting"]
)
def test_memory_goes_only_when_nothing_reads_it(options: dict[str, Any]) -> None:
    model = small_llama(layers=4)
    lag(model)
    booster, model, optimizer = boosted(model, **options)
    ids = ids_of(0)
    booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
    optimizer.step()
    runtime = weakref.ref(booster._runtime)
    del booster, model, optimizer
    gc.collect()
    assert runtime() is None
    torch.cuda.synchronize()


SCRIPT = """
import sys
from tests.gpu.llama import boosted, ids_of, small_llama
from tests.gpu.test_lagging_cuda import OFFLOADED, {options} as OPTIONS, lag
model = small_llama(layers=4)
lag(model)
booster, model, optimizer = boosted(model, **OPTIONS, **OFFLOADED)
for step in range(3):
    ids = ids_of(step)
    booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
    optimizer.step()
print("stepped", flush=True)
{end}
"""


ENDS = [(options, *end) for options in ("STREAMED", "VISITING") for end in (("", 0), ("sys.exit(3)", 3), ("raise RuntimeError", 1))]


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[tuple[str, str], subprocess.Popen[str]]]:
    """All at once: most of their time is imports."""
    started = {
        (options, end): subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(options=options, end=end)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for options, end, _ in ENDS
    }
    yield started
    for process in started.values():
        with process:
            process.kill()


@pytest.mark.parametrize(("options", "end", "code"), ENDS)
def test_the_process_ends_while_the_device_is_late(
    processes: dict[tuple[str, str], subprocess.Popen[str]], options: str, end: str, code: int
) -> None:
    process = processes[options, end]
    out, errors = process.communicate(timeout=300)
    assert out == "stepped\n", errors
    assert process.returncode == code, errors
