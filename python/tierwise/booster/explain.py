"""The plan in words."""

from __future__ import annotations

import json
from collections import Counter

from tierwise import _core
from tierwise.config import format_bytes
from tierwise.gemini.disk import disk_speeds
from tierwise.gemini.planning import predicted_with
from tierwise.gemini.runtime import Runtime

_BOUNDS = {
    "compute": "computing",
    "h2d": "copying parameters and activations to the device",
    "d2h": "copying gradients and activations to the host",
    "cpu_adam": "the CPU's optimizer step",
    "streamed": "copying optimizer states to the device and back",
    "nvme": "the disk, which reads and writes what is spilled",
    "host_memory": "adding gradients to accumulators in host memory",
}

_STEPS = {
    "device": "stepped on the device",
    "streamed": "stepped on the device, states visiting from host memory",
    "host": "stepped by the CPU",
    "nvme": "stepped by the CPU with their states on the disk",
    "frozen": "frozen",
}
_HOMES = {
    "resident": "resident",
    "streamed": "streamed",
    "spilled": "resident, with their copy on the disk",
    "fetched": "streamed from the disk",
}


def explain(runtime: Runtime) -> str:
    """A report of several lines: classes, bytes per tier, peak operation, what bounds the step, what a larger budget would buy."""
    if not runtime.ready:
        return "not planned yet: the plan is made at the first forward, for its shapes"
    plan = runtime.memory.plan
    layout = runtime.layout
    groups: dict[tuple[str, str, str], list[int]] = {}
    for chunk, placed in enumerate(plan["chunks"]):
        groups.setdefault((placed["class"], placed["home"], _gradients(placed, plan["accumulation"])), []).append(chunk)
    total = sum(param.numel() for chunk in runtime.grouping.chunks for param in chunk.params)
    lines = [
        f"{type(runtime.model).__name__}: {total / 1e6:.1f}M parameters, {runtime.plugin.precision}, "
        f"{runtime.trace.tokens} tokens per micro-batch, {plan['accumulation']} micro-batches per step, clip_mode {plan['clip_mode']}",
        "chunks:",
    ]
    for (cls, home, gradients), chunks in sorted(groups.items()):
        numel = sum(layout.numel(chunk) for chunk in chunks)
        where = f"{_HOMES[home]}, {gradients}" if gradients else _HOMES[home]
        lines.append(f"  {len(chunks)} {_STEPS[cls]}, parameters {where}: {numel / 1e6:.1f}M parameters ({_some(runtime, chunks)})")
    if plan["late_moments"] and any(placed["class"] == "host" for placed in plan["chunks"]):
        lines.append("the CPU's steps write parameters first, and their moments while the next backward runs")
    for tier, budget in (("device", runtime.planned.device_budget), ("host", runtime.planned.host_budget)):
        parts = {name: size for name, size in plan[tier].items() if size}
        used = sum(parts.values())
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(parts.items(), key=lambda item: -item[1]))
        lines.append(f"{tier}: {format_bytes(used)} of {format_bytes(budget)} ({listed or 'nothing'})")
    nvme = plan["nvme"]
    if nvme is not None:
        limit = format_bytes(runtime.planned.wanted["nvme"]["budget"])
        held = [("states", any(placed["class"] == "nvme" for placed in plan["chunks"]))]
        held += [("gradients", nvme["grad_buffers"] > 0)]
        held += [("frozen parameters", any((p["class"], p["home"]) == ("frozen", "fetched") for p in plan["chunks"]))]
        spilled = " and ".join(name for name, is_there in held if is_there)
        lines.append(
            f"nvme: {format_bytes(nvme['file_bytes'])} of {limit} in {runtime.plugin.nvme_path} "
            f"({format_bytes(nvme['payload_bytes'])} of {spilled} and room to rewrite them); "
            f"every step reads {format_bytes(nvme['read_bytes'])} and writes {format_bytes(nvme['written_bytes'])} "
            f"through {nvme['buffers']} buffers of {format_bytes(nvme['buffer_bytes'])}"
            + (
                f", parameters through {nvme['fetch_buffers']} of {format_bytes(nvme['fetch_buffer_bytes'])}"
                if nvme["fetch_buffers"]
                else ""
            )
            + (f", gradients through {nvme['grad_buffers']} of {format_bytes(nvme['grad_buffer_bytes'])}" if nvme["grad_buffers"] else "")
        )
    disk = disk_speeds(runtime.plugin)
    if disk is not None:
        lines.append(f"disk: reads {disk.read_bytes / 1e9:.2f} GB/s, writes {disk.write_bytes / 1e9:.2f} GB/s, each alone ({disk.source})")
    if runtime.choice is not None:
        predicted, executed = (
            ", ".join(f"{size}: {seconds:.3g} s" for size, seconds in sorted(by_size.items()))
            for by_size in (runtime.choice.predicted_s, runtime.choice.executed_s)
        )
        lines.append(f"micro_batch_size {runtime.choice.rows} chosen; predicted steps by size: {predicted}; simulated ones: {executed}")
    if runtime.trace.parts > 1:
        lines.append(f"layer by layer: a layer takes {runtime.layer_rows} rows at a time, in {runtime.trace.parts} parts")
    operation = runtime.trace.ops[plan["device_peak_op"]] if runtime.trace.ops else None
    if operation is not None:
        lines.append(f"device peak at {runtime.grouping.units[runtime.trace.order[operation[0]]].name} {operation[1]}")
    kept = zip(runtime.trace.order, runtime.planned.plan["activations"], strict=True)
    counts = Counter(how for unit, how in kept if runtime.grouping.units[unit].recomputable)
    lines.append(
        f"activations of {sum(counts.values())} layers: {counts['keep']} kept, {counts['recompute']} recomputed in backward, "
        f"{counts['offload']} offloaded to the host"
    )
    if runtime.saved.rematerialize:
        lines.append("of the other layers, outputs of normalizations and gated products are made again in backward")
    if not runtime.trace.exact:
        lines.append("activations are estimated: the model cannot be traced without data")
    bound = _BOUNDS.get(plan["bound_by"], plan["bound_by"])
    lines.append(f"predicted step: {plan['predicted_step_s']:.3g} s, bounded by {bound}")
    lines.append(_simulated(runtime))
    lines.append(_next_gib(runtime))
    return "\n".join(lines)


def _gradients(placed: dict[str, str], accumulation: int) -> str:
    """Where a chunk's gradients wait for its step, where that is not obvious."""
    where = "disk" if placed["accumulate"] == "nvme" else placed["accumulate"]
    if accumulation > 1 and placed["class"] != "frozen":
        return f"gradients added up on the {where}"
    return "gradients on the disk" if where == "disk" else ""


def _simulated(runtime: Runtime) -> str:
    """The plan's step as the simulator's executor times it, with the speeds that the planner weighed."""
    planned = runtime.planned
    # The plan that runs, which a correction after the first step may have changed.
    plan = json.dumps(runtime.memory.plan)
    step = json.loads(_core.simulate_plan(runtime.layout, planned.trace_json, plan, json.dumps(planned.wanted)))
    waits = {name.removesuffix("_ns").replace("_", " "): ns / 1e9 for name, ns in step["stalls"].items() if ns > step["step_ns"] * 1e-3}
    computing = (step["compute_ns"] + step["slowdown_ns"]) / 1e9
    waiting = "".join(f", {seconds:.3g} s waiting for: {name}" for name, seconds in sorted(waits.items(), key=lambda item: -item[1]))
    return f"simulated step: {step['step_ns'] / 1e9:.3g} s, {computing:.3g} s computing{waiting}"


def _next_gib(runtime: Runtime) -> str:
    """What a larger budget would buy, found by planning with it."""
    now = predicted_with(runtime.planned, runtime.layout, "device", 0)
    gains = {tier: now - predicted_with(runtime.planned, runtime.layout, tier, 2**30) for tier in ("device", "host")}
    bought = [f"{tier} memory {gain * 1e3:.3g} ms ({gain / now:.1%})" for tier, gain in gains.items() if gain > now * 1e-4]
    return f"one GiB more would save: {', '.join(bought)}" if bought else "one GiB more of either memory would save nothing"


def _some(runtime: Runtime, chunks: list[int]) -> str:
    names = [runtime.grouping.chunks[chunk].name for chunk in chunks]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}"
