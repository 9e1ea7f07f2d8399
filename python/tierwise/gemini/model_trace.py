"""What a traced forward tells: which unit runs when, what autograd saves in it, how many FLOPs it has; and the same run in other ways."""

from __future__ import annotations

import dataclasses
import json
import math

from tierwise.gemini.chunking import Grouping


@dataclasses.dataclass(kw_only=True)
class UnitTrace:
    """What one unit did in the traced forward."""

    saved_bytes: int = 0
    input_bytes: int = 0
    flops: float = 0.0
    tail_flops: float = 0.0
    """Of `flops`: those after the last tensor that its backward needs, where a recomputation stops."""
    offload_bytes: int = 0
    """Of `saved_bytes`: storages that are worth a copy to the host and that no other unit saves too."""
    offload_host_bytes: int = 0
    """What its offloaded storages take in host memory, shared ones included."""
    cheap_bytes: int = 0
    """Part of `saved_bytes` that cheap kernels can make again."""
    cheap_traffic_bytes: int = 0
    """Bytes of device memory that making it again moves."""
    rows: int = 0
    """First dimension of its first input."""
    extra_flops: float = 0.0
    """FLOPs whose time the making takes, where it is planned."""


@dataclasses.dataclass
class ModelTrace:
    """A traced forward. `order[i]` is the grouping's unit that is unit `i` of the trace."""

    order: list[int]
    units: list[UnitTrace]
    ops: list[tuple[int, str]]
    outer_saved_bytes: int
    tokens: int
    exact: bool
    regions: list[set[int]] = dataclasses.field(default_factory=list)
    """Groupings' units that run inside one checkpoint of the user's."""
    rows: int = 1
    """First dimension of the model's first input."""
    parts: int = 1
    """Parts in which a recomputed layer takes the rows."""

    def _chunks(self, grouping: Grouping, unit: int) -> list[int]:
        """Chunks that a unit needs. A checkpoint around several units needs all of theirs: one recomputation saves raw views of all."""
        chunks = list(grouping.units[unit].chunks)
        for region in self.regions:
            if unit in region:
                chunks += [chunk for other in sorted(region) for chunk in grouping.units[other].chunks]
        return list(dict.fromkeys(chunks))

    def to_json(self, grouping: Grouping, scale: float = 1.0) -> str:
        """The core's `Trace`; `scale` multiplies the saved bytes."""
        units = []
        for index, traced in zip(self.order, self.units, strict=True):
            unit = grouping.units[index]
            units.append(
                {
                    "name": unit.name,
                    "chunks": self._chunks(grouping, index),
                    "saved_bytes": int(traced.saved_bytes * scale),
                    "input_bytes": int(traced.input_bytes * scale),
                    "offload_bytes": int(traced.offload_bytes * scale),
                    "offload_host_bytes": math.ceil(traced.offload_host_bytes * scale),
                    "recomputable": unit.recomputable,
                    "flops": traced.flops + traced.extra_flops,
                    "tail_flops": traced.tail_flops,
                }
            )
        ops = [{"unit": unit, "phase": phase} for unit, phase in self.ops]
        return json.dumps({"units": units, "ops": ops, "outer_saved_bytes": int(self.outer_saved_bytes * scale)})

    def rematerialized(self, flops_per_byte: float) -> ModelTrace:
        """The same where outputs of cheap kernels are made again; `flops_per_byte` is how long moving a byte takes, in FLOPs."""
        units = [
            # The core's backward is twice the forward; all of the making is in backward.
            dataclasses.replace(
                unit,
                saved_bytes=unit.saved_bytes - unit.cheap_bytes,
                extra_flops=unit.cheap_traffic_bytes * flops_per_byte / 3,
                # A recipe keeps its inputs on the device.
                offload_bytes=0,
                offload_host_bytes=0,
            )
            for unit in self.units
        ]
        return dataclasses.replace(self, units=units)

    def recomputed_whole(self, whole: list[bool]) -> ModelTrace:
        """The same where a recomputation runs the whole forward of these of the grouping's units."""
        units = [
            dataclasses.replace(unit, tail_flops=0.0) if whole[index] else unit for index, unit in zip(self.order, self.units, strict=True)
        ]
        return dataclasses.replace(self, units=units)

    def layer_by_layer(self, grouping: Grouping, count: int) -> ModelTrace:
        """The same where every layer that can be recomputed is, and takes `count` rows at a time: it saves as much as they need. Where the
        micro-batch has no more, nothing is different."""
        parts = -(-self.rows // count)
        if parts == 1:
            return self
        units = [
            dataclasses.replace(unit, saved_bytes=-(-unit.saved_bytes // parts), offload_bytes=0, offload_host_bytes=0)
            if grouping.units[index].recomputable
            else unit
            for index, unit in zip(self.order, self.units, strict=True)
        ]
        return dataclasses.replace(self, units=units, parts=parts)

    def why_not_by_rows(self, grouping: Grouping, checkpointing: list[bool]) -> str | None:
        """Why layers cannot take the rows part by part; None if they can. `checkpointing` units recompute by themselves."""
        traced = dict(zip(self.order, self.units, strict=True))
        layers = [unit for unit in self.order if grouping.units[unit].recomputable]
        if not self.exact or not layers:
            return "the model has no layers that can be recomputed" if not layers else "the model cannot be traced"
        for unit in layers:
            name = grouping.units[unit].name
            if checkpointing[unit] or any(unit in region for region in self.regions):
                return f"{name!r} is checkpointed by the model itself"
            if traced[unit].rows not in (0, self.rows):  # A unit that this forward does not call has none.
                return f"{name!r} takes {traced[unit].rows} in the first dimension of its input, and the micro-batch has {self.rows} rows"
        return None

    @property
    def cheap_bytes(self) -> int:
        """Bytes of one forward that cheap kernels can make again."""
        return sum(unit.cheap_bytes for unit in self.units)

    def activation_peak_bytes(self, kept: list[str]) -> int:
        """Most bytes of saved activations at once, if the units of the trace "keep" or "recompute" theirs."""
        held = [unit.input_bytes if how == "recompute" else unit.saved_bytes for unit, how in zip(self.units, kept, strict=True)]
        alive = self.outer_saved_bytes
        peak = 0
        for unit, how, size in zip(self.units, kept, held, strict=True):
            alive += size
            peak = max(peak, alive + (unit.saved_bytes if how == "recompute" else 0))
        return peak

    def temporary_bytes(self) -> int:
        """Room for what no saved tensor shows: the gradients of one layer's intermediates, alive while its backward runs.

        Most of what a layer saves gets a gradient of its own size, but not all at once: 0.6 of it was measured on LLaMA layers.
        """
        of_a_part = int(0.6 * max((unit.saved_bytes for unit in self.units), default=0))
        # Where a layer takes rows part by part, its whole output and both gradients are there beside one part.
        return of_a_part + (3 * max((unit.input_bytes for unit in self.units), default=0) if self.parts > 1 else 0)

    def flops(self) -> float:
        """FLOPs of one forward."""
        return sum(unit.flops for unit in self.units)
