"""Asks the core for a plan, and turns a budget that cannot work into an error that says what would."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from tierwise import _core
from tierwise._core import BudgetError, Layout
from tierwise.config import Speeds, format_bytes
from tierwise.gemini.chunking import Grouping
from tierwise.gemini.disk import COMMON_READ, COMMON_WRITE, disk_speeds
from tierwise.gemini.model_trace import ModelTrace

if TYPE_CHECKING:
    from tierwise.booster.plugin.gemini import GeminiPlugin

_MIB = 2**20
_PLENTY = 2**46


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan with what it was made from; `plan` is the core's `Plan` as a dict."""

    trace_json: str
    plan_json: str
    plan: dict[str, Any]
    device_budget: int
    host_budget: int
    wanted: dict[str, Any]
    """The core's `PlanRequest` that it answers."""


def request(
    plugin: GeminiPlugin,
    speeds: Speeds,
    accumulation: int,
    device_budget: int,
    host_budget: int,
    recompute: object,
    offload: str,
    temporary_bytes: int = 0,
) -> dict[str, Any]:
    """The core's `PlanRequest` as a dict; `temporary_bytes` is what the device needs beside everything that is traced."""
    placement: object = "auto"
    nvme = nvme_request(plugin)
    if plugin.placement_policy == "static":
        fractions = ("shard_param_frac", "offload_optim_frac", "offload_param_frac", "stream_optim_frac")
        placement = {"static": {name: getattr(plugin, name) for name in fractions}}
    return {
        "device_budget": device_budget,
        "host_budget": host_budget,
        "reserve_bytes": plugin.reserve_bytes(device_budget, temporary_bytes),
        "placement": placement,
        "recompute": recompute,
        "offload": offload,
        "accumulation": accumulation,
        "accumulate": None if plugin.accumulate_on == "auto" else plugin.accumulate_on,
        "clip_mode": plugin.clip_mode,
        "speeds": dataclasses.asdict(speeds),
        "visiting": True,
        "nvme": nvme,
    }


def nvme_request(plugin: GeminiPlugin) -> dict[str, Any] | None:
    """The core's `NvmeRequest` as a dict, or None where nothing may be spilled."""
    if plugin.nvme_path is None:
        return None
    budget = plugin.nvme_budget
    if budget is None:
        disk = os.statvfs(plugin.nvme_path)
        budget = disk.f_bavail * disk.f_frsize * 9 // 10
    speeds = disk_speeds(plugin)
    assert speeds is not None
    return {"budget": budget, "read_bytes": speeds.read_bytes, "write_bytes": speeds.write_bytes}


def make_plan(
    plugin: GeminiPlugin, layout: Layout, grouping: Grouping, trace: ModelTrace, wanted: dict[str, Any], scale: float = 1.0
) -> Planned:
    """Plans a step. Raises BudgetError with the shortfall, the operation, and settings that fit (each found by planning with it)."""
    trace_json = trace.to_json(grouping, scale)
    try:
        plan_json = _core.choose_plan(layout, trace_json, json.dumps(wanted))
    except BudgetError as error:
        raise _explained(error, plugin, layout, grouping, trace, wanted, scale) from None
    plan = json.loads(plan_json)
    # "auto" may have become "defer": whoever asks again asks about the same kind of plan.
    wanted = {**wanted, "clip_mode": plan["clip_mode"]}
    return Planned(trace_json, plan_json, plan, wanted["device_budget"], wanted["host_budget"], wanted)


def executed_seconds(planned: Planned, layout: Layout) -> float:
    """Seconds of a plan's step as the simulator executes it."""
    outcome = json.loads(_core.simulate_plan(layout, planned.trace_json, planned.plan_json, json.dumps(planned.wanted)))
    return int(outcome["step_ns"]) / 1e9


def pick(plans: list[Planned], executed_s: list[float]) -> int:
    """Index of the plan of the fastest step: by the planner's formulas, unless the simulator executes another one 1 % faster."""
    first = min(range(len(plans)), key=lambda index: plans[index].plan["predicted_step_s"])
    best = min(range(len(plans)), key=lambda index: executed_s[index])
    return best if executed_s[best] < 0.99 * executed_s[first] else first


def predicted_with(planned: Planned, layout: Layout, tier: str, more_bytes: int) -> float:
    """Seconds of the planner's fastest step, by its formulas, if the budget of a tier ("device", "host") had `more_bytes` more."""
    key = f"{tier}_budget"
    wanted = {**planned.wanted, key: planned.wanted[key] + more_bytes}
    predicted: float = json.loads(_core.plan(layout, planned.trace_json, json.dumps(wanted)))["predicted_step_s"]
    return predicted


def _fits(layout: Layout, trace_json: str, wanted: dict[str, Any]) -> bool:
    try:
        _core.plan(layout, trace_json, json.dumps(wanted))
    except (BudgetError, ValueError):
        return False
    return True


def _smallest(layout: Layout, trace_json: str, wanted: dict[str, Any], key: str, low: int) -> int | None:
    """The smallest value of a budget, in whole MiB, with which a plan exists."""
    high = max(low, _MIB)
    for _ in range(24):
        if _fits(layout, trace_json, {**wanted, key: high}):
            break
        high *= 2
    else:
        return None
    low = low // _MIB
    high = -(-high // _MIB)
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(layout, trace_json, {**wanted, key: middle * _MIB}):
            high = middle
        else:
            low = middle
    return high if _fits(layout, trace_json, {**wanted, key: high * _MIB}) else None


def _alternatives(
    error: BudgetError,
    plugin: GeminiPlugin,
    layout: Layout,
    grouping: Grouping,
    trace: ModelTrace,
    wanted: dict[str, Any],
    scale: float,
) -> list[str]:
    trace_json = trace.to_json(grouping, scale)
    found: list[str] = []
    may_recompute = wanted["recompute"] == "none" and wanted["offload"] != "full"
    if may_recompute and _fits(layout, trace_json, {**wanted, "recompute": "full"}):
        found.append("recompute='full'")
    if wanted["offload"] == "none" and _fits(layout, trace_json, {**wanted, "offload": "auto"}):
        found.append("offload_activations='auto'")
    # A part of the rows is no measure of fewer rows.
    given = plugin.micro_batch_size if isinstance(plugin.micro_batch_size, int) and trace.parts == 1 else None
    size = given
    recompute = "full" if may_recompute else wanted["recompute"]
    while size is not None and size > 1 and len(found) < 2:
        size //= 2
        smaller = trace.to_json(grouping, scale * size / (given or 1))
        if _fits(layout, smaller, wanted):
            found.append(f"micro_batch_size={size}")
            break
        if recompute != wanted["recompute"] and _fits(layout, smaller, {**wanted, "recompute": recompute}):
            found.append(f"micro_batch_size={size} with recompute={recompute!r}")
            break
    if plugin.gradient_accumulation_steps > 1 and len(found) < 2 and _fits(layout, trace_json, {**wanted, "accumulation": 1}):
        found.append("gradient_accumulation_steps=1")
    if wanted["placement"] != "auto" and len(found) < 2 and _fits(layout, trace_json, {**wanted, "placement": "auto"}):
        found.append("placement_policy='auto'")
    if error.tier == "nvme" and wanted["nvme"] is not None:
        enough = -(-error.needed_bytes // _MIB)
        if _fits(layout, trace_json, {**wanted, "nvme": {**wanted["nvme"], "budget": enough * _MIB}}):
            found.insert(0, f"nvme_budget='{enough}MiB'")
    tier = "device_budget" if error.tier == "device" else "host_budget"
    for key in (tier, "device_budget", "host_budget"):
        if len(found) >= 2 or any(key in item for item in found):
            continue
        base = {**wanted, "recompute": recompute}
        for candidate, suffix in ((wanted, ""), (base, f" with recompute={recompute!r}")):
            value = _smallest(layout, trace_json, candidate, key, candidate[key])
            if value is not None:
                found.append(f"{key}='{value}MiB'{suffix}")
                break
    if len(found) < 2:
        # Both tiers are short: each with room to spare in the other.
        plenty = {"device_budget": "host_budget", "host_budget": "device_budget"}
        for key, other in plenty.items():
            value = _smallest(layout, trace_json, {**wanted, other: _PLENTY}, key, 0)
            second = None if value is None else _smallest(layout, trace_json, {**wanted, key: value * _MIB}, other, 0)
            if value is not None and second is not None:
                found.append(f"{key}='{value}MiB' with {other}='{second}MiB'")
    return found[:2]


def _spilling(error: BudgetError, layout: Layout, trace_json: str, wanted: dict[str, Any]) -> str:
    """What a disk would do about missing host memory, if it can do anything."""
    if error.tier != "host" or wanted["nvme"] is not None:
        return ""
    try:
        plan = json.loads(
            _core.plan(
                layout,
                trace_json,
                json.dumps({**wanted, "nvme": {"budget": _PLENTY, "read_bytes": COMMON_READ, "write_bytes": COMMON_WRITE}}),
            )
        )
    except (BudgetError, ValueError):
        return ""
    size = format_bytes(plan["nvme"]["file_bytes"])
    return f"; nvme_path=<a directory on an NVMe disk> makes it fit, with {size} of disk (limit it with nvme_budget)"


def _explained(
    error: BudgetError,
    plugin: GeminiPlugin,
    layout: Layout,
    grouping: Grouping,
    trace: ModelTrace,
    wanted: dict[str, Any],
    scale: float,
) -> BudgetError:
    where = f" at {error.op}" if error.op else ""
    parts = ", ".join(
        f"{name} {format_bytes(value)}" for name, value in sorted(error.breakdown.items(), key=lambda item: -item[1]) if value
    )
    found = _alternatives(error, plugin, layout, grouping, trace, wanted, scale)
    remedy = f"; these fit: {' or '.join(found)}" if found else "; no single setting makes it fit, raise both budgets"
    explained = BudgetError(
        f"needs {format_bytes(error.shortfall_bytes)} more {error.tier} memory{where}: "
        f"{format_bytes(error.needed_bytes)} needed ({parts}), {format_bytes(error.budget_bytes)} allowed"
        f"{_spilling(error, layout, trace.to_json(grouping, scale), wanted)}{remedy}"
    )
    for name in ("tier", "op", "needed_bytes", "budget_bytes", "shortfall_bytes", "breakdown"):
        setattr(explained, name, getattr(error, name))
    return explained
