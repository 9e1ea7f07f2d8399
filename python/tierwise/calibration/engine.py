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
    layers = 24 - 8
    forward = (many["none"]["forward"] - few["none"]["forward"]) / layers
    backward = (many["none"]["backward"] - few["none"]["backward"]) / layers
    return {
        "forward_ns": _positive(forward),
        "backward_ns": _positive(backward),
        "checkpointed_forward_ns": _positive((many["full"]["forward"] - few["full"]["forward"]) / layers),
        "checkpointed_backward_ns": _positive((many["full"]["backward"] - few["full"]["backward"]) / layers),
        "outside_forward_ns": _positive(few["none"]["forward"] - 8 * forward),
        "outside_backward_ns": _positive(few["none"]["backward"] - 8 * backward),
        "step_ns": _positive(few["none"]["step"]),
    }


def _positive(ns: float) -> int:
    return max(round(ns), 1)


def _boosted(device: torch.device, layers: int, hidden: int, recompute: str) -> tuple[Any, Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tierwise.booster import Booster
    from tierwise.booster.plugin import GeminiPlugin

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 16, vocab_size=256, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model: nn.Module = LlamaForCausalLM(config)
    model.to(device)
    plugin = GeminiPlugin(
        placement_policy="static", offload_optim_frac=0.0, micro_batch_size=1, seq_len=32, recompute=recompute,  # type: ignore[arg-type]
        device="cuda" if device.type == "cuda" else "emulated", device_budget="8GB" if device.type == "cuda" else "1GB",
        host_budget="256MB", enable_all_optimization=True, max_norm=1.0,
    )  # fmt: skip
    booster = Booster(plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    booster.boost(model, optimizer)
    model.train()
    return booster, model, optimizer


def _step_ns(device: torch.device, layers: int, recompute: str) -> dict[str, float]:
    booster, model, optimizer = _boosted(device, layers, 64, recompute)
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
    booster, model, optimizer = _boosted(device, 2, 2048 if device.type == "cuda" else 64, "none")
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
    spans = [e for e in events if e["ph"] == "X" and tracks[e["tid"]] == "device optimizer" and e["dur"] > 0]
    spans = [e for e in spans if "layers" in e["name"]]
    rates = [event["args"]["bytes"] / 26 / (event["dur"] / 1e6) for event in spans]
    return statistics.median(rates) if rates else None
