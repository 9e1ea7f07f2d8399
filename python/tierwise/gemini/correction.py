"""After the first step the measured activation peak corrects the plan, once."""

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
    """Peak of saved activations in the first step: counted on the emulated device, torch's peak minus what is held on CUDA."""
    if runtime.target.emulated:
        assert runtime.counter is not None
        return runtime.counter.peak_bytes
    planned = runtime.planned.plan["device"]
    held = planned["resident_params"] + planned["states"] + planned["stream_slab"] + planned["accumulators"] + planned["gradients"]
    held += planned["staging"]
    measured: int = torch.cuda.max_memory_allocated(runtime.target.torch_device) - held - runtime.search.temporary_bytes(runtime.trace)
    return max(measured, 0)


def correct(runtime: Runtime) -> None:
    """Plans again with the measured activations. Room that turned up takes optimizer states from the host, which changes no bit; the plan
    is otherwise kept, because one that ran within its budget needs no rescue."""
    kept = runtime.planned.plan["activations"]
    if "offload" in kept:
        # How much of the window was in use depends on the link's speed in that one step.
        return
    units = [how == "recompute" for how in kept]
    planned = runtime.trace.activation_peak_bytes(kept)
    measured = measured_activation_bytes(runtime)
    if runtime.plugin.placement_policy != "auto" or not planned or not measured or measured > planned * (1 - _TOLERANCE):
        return
    from tierwise.gemini.planning import make_plan

    wanted = {**runtime.planned.wanted, "recompute": {"units": units}, "offload": "none"}
    try:
        corrected = make_plan(runtime.plugin, runtime.layout, runtime.grouping, runtime.trace, wanted, measured / planned)
    except (BudgetError, ValueError):
        return
    now = runtime.memory.plan["chunks"]
    moves = [
        chunk
        for chunk, (new, old) in enumerate(zip(corrected.plan["chunks"], now, strict=True))
        if new["class"] == "device" and old["class"] in ("host", "streamed")
    ]
    if not moves:
        return
    runtime.flush()
    # Only what the corrected plan frees may be taken: other classes and homes stay as they are.
    room = planned - measured
    moved = 0
    for chunk in moves:
        need = runtime.layout.state_bytes(chunk)
        if chunk not in runtime.memory.resident:
            need += runtime.layout.param_bytes(chunk)
        if runtime.memory.plan["accumulation"] > 1:
            need += 0 if chunk in runtime.memory.accumulators else runtime.layout.grad_acc_bytes(chunk)
        elif now[chunk]["class"] == "host":
            # Others keep their gradients on the device as it is.
            need += runtime.layout.grad_bytes(chunk)
        if need > room:
            continue
        try:
            runtime.move_to_device(chunk)
        except TierwiseError as error:
            _log.warning("the plan was not corrected further: %s", error)
            break
        room -= need
        moved += 1
    _log.info(
        "measured activations are %s (planned %s): %d chunks moved to the device class",
        format_bytes(measured),
        format_bytes(planned),
        moved,
    )
