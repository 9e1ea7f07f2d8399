"""After the first step the measured device peak corrects the plan, once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from tierwise._core import BudgetError, TierwiseError
from tierwise.config import format_bytes

if TYPE_CHECKING:
    from tierwise.gemini.runtime import Runtime

_log = logging.getLogger("tierwise")
_TOLERANCE = 0.02


def measured_activation_bytes(runtime: Runtime) -> int:
    """What the first step's device peak leaves for activations: the peak minus what else the plan holds at its own.

    Most activations are alive when backward begins, most gradients when it ends. So a peak of activations alone, or of another moment than
    the plan's, says nothing about the room that is left at the plan's.
    """
    planned = runtime.planned.plan["device"]
    if runtime.target.emulated:
        peak = int(runtime.engine.stats()["device_peak_bytes"])
    else:
        # Temporaries are part of the peak; what they take beyond the reserve is no room.
        temporaries = min(runtime.search.temporary_bytes(runtime.trace), planned["reserve"])
        peak = int(torch.cuda.max_memory_allocated(runtime.target.torch_device)) - temporaries
    held = sum(planned.values()) - planned["reserve"] - planned["activations"]
    # Whether the thread ran ahead of its gradients in that one step depends on who was waited for: what it may is no room.
    held -= min(runtime.planned.plan["grad_ahead_bytes"], planned["gradients"])
    return max(peak - int(held), 0)


def correct(runtime: Runtime) -> None:
    """Plans again with the measured activations. Room that turned up takes optimizer states from the host, which changes no bit; the plan
    is otherwise kept, because one that ran within its budget needs no rescue."""
    kept = runtime.planned.plan["activations"]
    if "offload" in kept:
        # How much of the window was in use depends on the link's speed in that one step.
        return
    units = [how == "recompute" for how in kept]
    device = runtime.planned.plan["device"]
    planned = device["activations"]
    measured = measured_activation_bytes(runtime)
    if runtime.plugin.placement_policy != "auto" or not planned or not measured or measured > planned * (1 - _TOLERANCE):
        return
    from tierwise.gemini.planning import make_plan

    # The engine keeps what it was made with: an "auto" that speculates is not weighed against "defer" again.
    plan = runtime.memory.plan
    clip_mode = "defer" if plan["clip_mode"] == "defer" else "speculate"
    settled = {"late_moments": plan["late_moments"], "clip_mode": clip_mode}
    wanted = {**runtime.planned.wanted, "recompute": {"units": units}, "offload": "none", **settled}
    try:
        corrected = make_plan(runtime.plugin, runtime.layout, runtime.grouping, runtime.trace, wanted, measured / planned)
    except (BudgetError, ValueError):
        return
    # Only what the corrected plan frees may be taken: other classes and homes stay as they are.
    room = planned - measured
    moves: dict[int, dict[str, int]] = {}
    for chunk, new in enumerate(corrected.plan["chunks"]):
        if new["class"] == "device" and runtime.memory.plan["chunks"][chunk]["class"] in ("host", "streamed"):
            need = _taken(runtime, chunk)
            if sum(need.values()) <= room:
                moves[chunk] = need
                room -= sum(need.values())
    if not moves:
        return
    runtime.flush()
    moved = 0
    for chunk, need in moves.items():
        try:
            runtime.move_to_device(chunk)
        except TierwiseError as error:
            _log.warning("the plan was not corrected further: %s", error)
            break
        moved += 1
        # Reports and errors say what the plan holds now.
        for purpose, size in need.items():
            device[purpose] += size
            device["activations"] -= size
    _log.info(
        "measured activations are %s (planned %s): %d chunks moved to the device class",
        format_bytes(measured),
        format_bytes(planned),
        moved,
    )


def _taken(runtime: Runtime, chunk: int) -> dict[str, int]:
    """Device bytes, by purpose, that a chunk with states in host memory takes in the device class beside what it has there."""
    layout, memory = runtime.layout, runtime.memory
    need = {"states": layout.state_bytes(chunk)}
    if chunk not in memory.resident:
        need["resident_params"] = layout.param_bytes(chunk)
    if memory.plan["accumulation"] > 1:
        need["accumulators"] = 0 if chunk in memory.accumulators else layout.grad_acc_bytes(chunk)
    elif memory.plan["chunks"][chunk]["class"] == "host":
        # Others keep their gradients on the device as it is.
        need["gradients"] = layout.grad_bytes(chunk)
    return need
