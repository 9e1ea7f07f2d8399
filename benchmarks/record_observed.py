"""What a recorded configuration ran as: its plan, its trace, and its timeline in sums."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from typing import Any

NUMBERS = re.compile(r"\d+")


def executed(runtime: Any) -> dict[str, Any]:
    """The plan that ran, by names of chunks and units."""
    plan, chunks = runtime.memory.plan, runtime.grouping.chunks
    placed = list(zip(chunks, plan["chunks"], strict=True))
    units = [runtime.grouping.units[unit].name for unit in runtime.trace.order]
    return {
        "host_chunks": [chunk.name for chunk, place in placed if place["class"] == "host"],
        "visiting_chunks": [chunk.name for chunk, place in placed if place["class"] == "streamed"],
        "device_summed_chunks": [chunk.name for chunk, place in placed if place["accumulate"] == "device" and place["class"] != "frozen"],
        "streamed_chunks": [chunk.name for chunk, place in placed if place["home"] == "streamed"],
        "recomputed_units": [name for name, how in zip(units, plan["activations"], strict=True) if how == "recompute"],
        "offloaded_units": [name for name, how in zip(units, plan["activations"], strict=True) if how == "offload"],
        "offload_window_bytes": plan["offload_window_bytes"],
        "rematerialized": runtime.saved.rematerialize,
        "stream_slab_bytes": plan["stream_slab_bytes"],
        "grad_in_flight_bytes": plan["grad_in_flight_bytes"],
        "undo_bytes": plan["undo_bytes"],
        "late_moments": plan["late_moments"],
        "landing_buffers": plan["landing_buffers"],
        "device": plan["device"],
        "host": plan["host"],
        "predicted_step_s": plan["predicted_step_s"],
    }


def traced(runtime: Any) -> dict[str, Any]:
    """What the trace says of each kind of unit."""
    kinds: dict[str, Any] = {}
    for unit, found in zip(runtime.trace.order, runtime.trace.units, strict=True):
        name = NUMBERS.sub("*", runtime.grouping.units[unit].name)
        kinds[name] = {"saved_bytes": found.saved_bytes, "input_bytes": found.input_bytes, "flops": found.flops}
    return {
        "units": kinds,
        "outer_saved_bytes": runtime.trace.outer_saved_bytes,
        "temporary_bytes": runtime.search.temporary_bytes(runtime.trace),
    }


def spans_of(timeline: str) -> Iterator[tuple[str, str, float, int]]:
    """(track, kind, seconds, bytes) of every span; a kind is a name without its numbers."""
    events = json.loads(timeline)["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    for event in events:
        if event["ph"] == "X":
            yield tracks[event["tid"]], NUMBERS.sub("*", event["name"]), event["dur"] / 1e6, event["args"]["bytes"]


def summary(spans: list[tuple[str, str, float, int]]) -> dict[str, dict[str, Any]]:
    groups: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for track, kind, seconds, size in spans:
        groups.setdefault((track, kind), []).append((seconds, size))
    found: dict[str, dict[str, Any]] = {}
    for (track, kind), values in sorted(groups.items()):
        seconds = sorted(value for value, _ in values)
        found.setdefault(track, {})[kind] = {
            "count": len(seconds),
            "seconds": round(sum(seconds), 6),
            "least_s": round(seconds[0], 6),
            "median_s": round(statistics.median(seconds), 6),
            "most_s": round(seconds[-1], 6),
            "bytes": sum(size for _, size in values),
        }
    return found
