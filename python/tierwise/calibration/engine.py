"""What the engine and its hooks cost: the training thread per unit, and the device's own optimizer step."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch
from torch import nn

_STEPS = 8


def launches(device: torch.device) -> dict[str, int]:
    """Nanoseconds in which the training thread enqueues a unit's forward and backward, with and without recomputation, and what a step
    takes beside its units: from a model so small that the device waits for Python. Raises ImportError without transformers."""
    few = {again: _step_ns(device, 8, again) for again in ("none", "full")}
    many = {again: _step_ns(device, 24, again) for again in ("none", "full")}

    def line(again: str, what: str) -> tuple[int, int]:
        """Per layer, and beside all layers."""
        slope = (many[again][what] - few[again][what]) / (24 - 8)
        # Noise must not make what is outside the layers negative.
        slope = min(slope, many[again][what] / 24)
        return _positive(slope), _positive(many[again][what] - 24 * slope)

    (forward, outside_forward), (backward, outside_backward) = line("none", "forward"), line("none", "backward")
    return {
        "forward_ns": forward,
        "backward_ns": backward,
        "checkpointed_forward_ns": line("full", "forward")[0],
        "checkpointed_backward_ns": line("full", "backward")[0],
        "outside_forward_ns": outside_forward,
        "outside_backward_ns": outside_backward,
        "step_ns": _positive(many["none"]["step"]),
    }


def _positive(ns: float) -> int:
    return max(round(ns), 1)


def _boosted(device: torch.device, layers: int, hidden: int, recompute: str, on_host: bool = False) -> tuple[Any, Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tierwise.booster import Booster
    from tierwise.booster.plugin import GeminiPlugin

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, vocab_size=256, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model: nn.Module = LlamaForCausalLM(config)
    model.to(device)
    plugin = GeminiPlugin(
        placement_policy="static", offload_optim_frac=float(on_host), offload_activations="none", micro_batch_size=1, seq_len=32,
        recompute=recompute,  # type: ignore[arg-type]
        device="cuda" if device.type == "cuda" else "emulated", device_budget="8GB" if device.type == "cuda" else "1GB",
        host_budget="16GB" if on_host and device.type == "cuda" else "256MB", enable_all_optimization=True, max_norm=1.0,
    )  # fmt: skip
    booster = Booster(plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    booster.boost(model, optimizer)
    model.train()
    return booster, model, optimizer


def _step_ns(device: torch.device, layers: int, recompute: str) -> dict[str, float]:
    booster, model, optimizer = _boosted(device, layers, 512 if device.type == "cuda" else 64, recompute)
    ids = torch.zeros(1, 32, dtype=torch.long, device=device)
    times: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}
    for _ in range(_STEPS):
        marks = [time.perf_counter()]
        loss = model(input_ids=ids, labels=ids).loss
        marks.append(time.perf_counter())
        booster.backward(loss, optimizer)
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        # A step that waits for the one before is not launching.
        booster.flush()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for name, start, end in zip(times, marks, marks[1:], strict=False):
            times[name].append(1e9 * (end - start))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def device_adam_params_per_s(device: torch.device) -> float | None:
    """Parameters per second of the device's optimizer step, from the engine's timeline; None if it recorded none."""
    rates = _adam_rates(device, 2048 if device.type == "cuda" else 64, on_host=False)
    return statistics.median(rates) if rates else None


def host_adam_params_per_s(device: torch.device) -> float | None:
    """Parameters per second of the host's optimizer step as the engine runs it, with nothing beside it: the fastest chunk of a step; the
    others share the memory with copies of what was stepped before it. None if it recorded none."""
    rates = _adam_rates(device, 4096 if device.type == "cuda" else 64, on_host=True)
    return max(rates) if rates else None


def _adam_rates(device: torch.device, hidden: int, on_host: bool) -> list[float]:
    """Of every step of a layer's chunk: parameters per second."""
    booster, model, optimizer = _boosted(device, 3, hidden, "none", on_host)
    ids = torch.zeros(1, 32, dtype=torch.long, device=device)
    for step in range(4):
        if step == 1:
            booster.record_timeline()
        loss = model(input_ids=ids, labels=ids).loss
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        booster.flush()
    events = json.loads(booster._boosted().engine.timeline())["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    track = "host optimizer" if on_host else "device optimizer"
    spans = [e for e in events if e["ph"] == "X" and tracks[e["tid"]] == track and e["dur"] > 0 and "layers" in e["name"]]
    return [event["args"]["bytes"] / 26 / (event["dur"] / 1e6) for event in spans]
