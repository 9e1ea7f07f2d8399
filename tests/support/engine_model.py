"""A small model driven through `tierwise._core.Engine`, and a slow, obvious optimizer that predicts all of its bits.

`Rig` plays the part of the Python layer: it owns the device memory, hands gradients over, frees them when the engine says so (overwriting
them, so that a late reader computes something wrong), and compares every parameter that an `enter` makes readable with `Reference`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tierwise import _core

Array = npt.NDArray[Any]
Hyper = tuple[float, float, float, float, float, bool]
"""lr, beta1, beta2, eps, weight_decay, decoupled"""

SLOT_ALIGN = 256
STREAM = 0
ADAMW: Hyper = (1e-2, 0.9, 0.99, 1e-8, 0.1, True)

PARAM_DTYPE: dict[str, np.dtype[Any]] = {"bf16": np.dtype(np.uint16), "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
STATE_BYTES = {"bf16": 10, "fp16": 12, "fp32": 8}
"""Bytes of optimizer state of one element."""
MASTER_DTYPE: dict[str, np.dtype[Any]] = {"bf16": np.dtype(np.int16), "fp16": np.dtype(np.float32)}


def address(array: Array) -> int:
    """Address of the first element."""
    return int(array.ctypes.data)


def bits(array: Array) -> Array:
    """The same memory as unsigned integers, so that comparisons are of bits."""
    return array.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize])


def widen(stored: Array) -> Array:
    """Elements of a gradient payload (bf16 as uint16) in fp32, exactly."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def narrow(values: Array, precision: str) -> Array:
    """fp32 values rounded (bf16: cut off, which is as good for a test) to a precision."""
    if precision == "bf16":
        return (bits(values.astype(np.float32)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(PARAM_DTYPE[precision])


def split_bf16(master: Array) -> tuple[Array, Array]:
    """bf16 parameter and int16 low half of fp32 masters."""
    raw = bits(np.ascontiguousarray(master, np.float32)).astype(np.uint64)
    return ((raw + 0x8000) >> 16).astype(np.uint16), raw.astype(np.uint16).view(np.int16)


def sum_squares(values: Array) -> float:
    """Sum of squares in the reduction tree of every device."""
    dtype = {np.dtype(np.uint16): "bf16", np.dtype(np.float16): "fp16", np.dtype(np.float32): "fp32"}[values.dtype]
    values = np.ascontiguousarray(values)
    return _core.sum_squares(address(values), dtype, values.size, threads=1)


@dataclass(frozen=True)
class ChunkSpec:
    """A chunk: its parameters as (numel, trainable), and where it lives."""

    params: tuple[tuple[int, bool], ...]
    cls: str = "host"
    home: str = "streamed"
    sums: str = "host"
    """Where its gradients are added up; always on the device if they are stepped there."""

    @property
    def sums_on_device(self) -> bool:
        """Whether accumulation needs an accumulator on the device."""
        return self.cls in ("device", "streamed") or (self.cls == "host" and self.sums == "device")


@dataclass(frozen=True)
class Setup:
    """Everything that an engine is built from."""

    chunks: tuple[ChunkSpec, ...]
    units: tuple[tuple[int, ...], ...] = ()
    """Chunks of every unit; one unit per chunk if empty."""
    precision: str = "fp32"
    slab_extra_bytes: int = 0
    """Bytes of the slab beyond what the largest unit needs."""
    piece_numel: int = 128
    """Elements of a streamed chunk whose states visit the device at once."""
    accumulation: int = 1
    clip_mode: str = "defer"
    undo_bytes: int = 1 << 20
    late_moments: bool = False
    landing_buffers: int = 2
    grad_in_flight_bytes: int = 1 << 20
    max_norm: float | None = None
    threads: int = 1
    h2d_bytes_per_second: float | None = None
    d2h_bytes_per_second: float | None = None
    latency_ns: int = 0
    device_budget: int = 1 << 22
    host_budget: int = 1 << 24
    seed: int = 0

    def unit_chunks(self) -> tuple[tuple[int, ...], ...]:
        """Chunks of every unit."""
        return self.units or tuple((chunk,) for chunk in range(len(self.chunks)))

    def layout(self) -> _core.Layout:
        """The layout of the chunks."""
        chunks = [
            (f"chunk{c}", [(f"chunk{c}.p{p}", numel, trainable) for p, (numel, trainable) in enumerate(spec.params)])
            for c, spec in enumerate(self.chunks)
        ]
        return _core.Layout(self.precision, chunks)

    def slab_bytes(self) -> int:
        """Bytes of the slab: the largest unit's slots and the extra."""
        layout = self.layout()
        slots = [-(-layout.param_bytes(c) // SLOT_ALIGN) * SLOT_ALIGN for c in range(len(self.chunks))]
        streamed = [sum(slots[c] for c in set(unit) if self.chunks[c].home == "streamed") for unit in self.unit_chunks()]
        largest = max(streamed, default=0)
        return largest + self.slab_extra_bytes if largest else 0

    def staging_bytes(self) -> int:
        """Bytes of the three buffers that the states of streamed chunks pass through."""
        return 3 * self.piece_numel * STATE_BYTES[self.precision]

    def trace(self) -> str:
        """Forward of every unit in order, then backward in reverse."""
        units = self.unit_chunks()
        order = [(u, "forward") for u in range(len(units))] + [(u, "backward") for u in reversed(range(len(units)))]
        described = [
            {"name": f"unit{u}", "chunks": list(chunks), "saved_bytes": 0, "input_bytes": 0, "recomputable": True, "flops": 1.0}
            for u, chunks in enumerate(units)
        ]
        return json.dumps({"units": described, "ops": [{"unit": u, "phase": p} for u, p in order], "outer_saved_bytes": 0})

    def plan(self) -> str:
        """The plan, with predictions left at zero."""
        layout = self.layout()
        staging = max(layout.grad_bytes(c) for c in range(len(self.chunks))) if self.accumulation > 1 else 0
        device = dict.fromkeys(("resident_params", "states", "stream_slab", "accumulators", "gradients", "activations", "reserve"), 0)
        device["staging"] = self.staging_bytes()
        host = {"params": 0, "states": 0, "gradients": 0, "staging": self.landing_buffers * staging, "undo": 0}
        return json.dumps(
            {
                "version": 1,
                "chunks": [
                    {"class": spec.cls, "home": spec.home, "accumulate": "device" if spec.sums_on_device else "host"}
                    for spec in self.chunks
                ],
                "activations": ["keep"] * len(self.unit_chunks()),
                "offload_window_bytes": 0,
                "stream_slab_bytes": self.slab_bytes(),
                "grad_in_flight_bytes": self.grad_in_flight_bytes,
                "accumulation": self.accumulation,
                "clip_mode": self.clip_mode,
                "undo_bytes": 0 if self.clip_mode == "defer" else self.undo_bytes,
                "late_moments": self.late_moments,
                "landing_buffers": self.landing_buffers,
                "device": device,
                "device_peak_op": 0,
                "host": host,
                "fetches": [],
                "predicted_step_s": 0.0,
                "bound_by": "compute",
            }
        )

    def spare_bytes(self) -> int:
        """Host bytes with which every resident chunk may become host-class."""
        layout = self.layout()
        per_chunk = [layout.param_bytes(c) + layout.state_bytes(c) + layout.grad_acc_bytes(c) for c in range(len(self.chunks))]
        return 2 * sum(bytes_ + 5 * 4096 for bytes_ in per_chunk)


@dataclass
class Decided:
    """What `Engine.decision` must say."""

    step: int
    norm: float
    coefficient: float
    skipped: bool


class Reference:
    """Synchronous AdamW over the same chunks, one parameter after the other."""

    def __init__(self, setup: Setup, layout: _core.Layout) -> None:
        self.setup = setup
        self.layout = layout
        rng = np.random.default_rng(setup.seed)
        self.param: list[Array] = []
        self.master: list[Array] = []
        self.exp_avg: list[Array] = []
        self.exp_avg_sq: list[Array] = []
        for chunk in range(layout.num_chunks):
            values = rng.standard_normal(layout.numel(chunk)).astype(np.float32)
            state = layout.state_numel(chunk)
            self.param.append(split_bf16(values)[0] if setup.precision == "bf16" else narrow(values, setup.precision))
            self.master.append(values[:state].copy())
            self.exp_avg.append(np.zeros(state, np.float32))
            self.exp_avg_sq.append(np.zeros(state, np.float32))
        self.num_params = sum(len(spec.params) for spec in setup.chunks)
        self.steps = [0] * self.num_params
        self.generation = [0] * layout.num_chunks
        self.max_norm = setup.max_norm
        self.groups: list[Hyper] = [ADAMW]
        self.group_of_param = [0] * self.num_params
        self.grads: dict[tuple[int, int], Array] = {}
        self.handed: set[int] = set()
        self.decided: Decided | None = None

    def add_grads(self, chunk: int, grads: Mapping[int, Array]) -> None:
        """Gradients of one micro-batch; fp32 accumulators only with accumulation."""
        self.handed.add(chunk)
        for position, grad in grads.items():
            key = (chunk, position)
            if self.setup.accumulation == 1:
                self.grads[key] = grad.copy()
            elif key in self.grads:
                with np.errstate(all="ignore"):
                    self.grads[key] = self.grads[key] + widen(grad)
            else:
                self.grads[key] = widen(grad)

    def drop_grads(self) -> None:
        """`zero_grad()`."""
        self.grads.clear()
        self.handed.clear()

    def commit(self, grad_scale: float) -> Decided:
        """`optimizer.step()`: clips by the global norm and steps every parameter that has a gradient."""
        total = 0.0
        for key in sorted(self.grads):
            total += sum_squares(self.grads[key])
        norm = math.sqrt(total) * grad_scale if not math.isnan(total) else math.nan
        skipped = not math.isfinite(norm)
        coefficient = 1.0
        if self.max_norm is not None and not skipped:
            coefficient = min(self.max_norm / (norm + 1e-6), 1.0)
        number = 1 if self.decided is None else self.decided.step + 1
        self.decided = Decided(number, norm, coefficient, skipped)
        if not skipped:
            for (chunk, position), grad in sorted(self.grads.items(), key=lambda item: item[0]):
                self._adam(chunk, position, grad, coefficient * grad_scale)
            for chunk in self.handed:
                self.generation[chunk] += 1
        self.drop_grads()
        return self.decided

    def _adam(self, chunk: int, position: int, grad: Array, grad_scale: float) -> None:
        f32 = np.float32
        index = self.layout.param_indices(chunk)[position]
        offset = self.layout.param_offsets(chunk)[position]
        at = slice(offset, offset + self.setup.chunks[chunk].params[position][0])
        self.steps[index] += 1
        lr, beta1, beta2, eps, weight_decay, decoupled = self.groups[self.group_of_param[index]]
        correction1 = 1.0 - math.pow(beta1, float(self.steps[index]))
        correction2 = 1.0 - math.pow(beta2, float(self.steps[index]))
        w: Array = self.master[chunk][at]
        with np.errstate(all="ignore"):
            g: Array = widen(grad) * f32(grad_scale)
            if not decoupled and weight_decay != 0.0:
                g = g + f32(weight_decay) * w
            m = f32(beta1) * self.exp_avg[chunk][at] + f32(1.0 - beta1) * g
            v = f32(beta2) * self.exp_avg_sq[chunk][at] + (f32(1.0 - beta2) * g) * g
            m = np.where(np.abs(m) < f32(2.0**-126), f32(0.0), m)
            v = np.where(np.abs(v) < f32(2.0**-126), f32(0.0), v)
            denom = np.sqrt(v) / f32(math.sqrt(correction2)) + f32(eps)
            if decoupled:
                w = w * f32(1.0 - lr * weight_decay)
            w = w - f32(lr / correction1) * (m / denom)
        self.master[chunk][at] = w
        self.exp_avg[chunk][at] = m
        self.exp_avg_sq[chunk][at] = v
        self.param[chunk][at] = split_bf16(w)[0] if self.setup.precision == "bf16" else narrow(w, self.setup.precision)

    def payloads(self, chunk: int) -> dict[str, Array]:
        """Payloads of a chunk as the engine stores them."""
        master = self.master[chunk]
        stored = {"param": self.param[chunk], "exp_avg": self.exp_avg[chunk], "exp_avg_sq": self.exp_avg_sq[chunk]}
        if self.setup.precision == "bf16":
            stored["master"] = split_bf16(master)[1]
        elif self.setup.precision == "fp16":
            stored["master"] = master
        return stored


@dataclass
class DeviceMemory:
    """What the caller binds for one chunk."""

    param: Array | None = None
    states: Array | None = None
    accumulator: Array | None = None


@dataclass
class Rig:
    """An engine on an emulated device, its memory, and the reference beside it."""

    setup: Setup
    started: bool = True
    layout: _core.Layout = field(init=False)
    device: _core.Device = field(init=False)
    engine: _core.Engine = field(init=False)

    def __post_init__(self) -> None:
        setup = self.setup
        self.layout = setup.layout()
        self.device = _core.Device.emulated(
            h2d_bytes_per_second=setup.h2d_bytes_per_second,
            d2h_bytes_per_second=setup.d2h_bytes_per_second,
            latency_ns=setup.latency_ns,
            threads=setup.threads,
        )
        self.engine = _core.Engine(
            self.layout,
            setup.trace(),
            setup.plan(),
            self.device,
            device_budget=setup.device_budget,
            host_budget=setup.host_budget,
            max_norm=setup.max_norm,
            threads=setup.threads,
            host_spare_bytes=setup.spare_bytes(),
        )
        self.reference = Reference(setup, self.layout)
        self.classes = [spec.cls for spec in setup.chunks]
        self.host: Array = np.frombuffer(memoryview(self.engine.host_buffer), dtype=np.uint8)
        self.slab = np.zeros(max(setup.slab_bytes(), 1), np.uint8)
        self.staging = np.full(setup.staging_bytes(), 0xFF, np.uint8)
        self.memory = [DeviceMemory() for _ in setup.chunks]
        self.lent: dict[int, list[Array]] = {}
        self.collected: set[int] = set()
        self.issued: set[int] = set()
        self.generations = [0] * len(setup.chunks)
        self.micro_step = 0
        self.fill()
        if self.started:
            self.engine.start()
            self.set_hyper([ADAMW], [0] * self.reference.num_params)

    # ---- memory -------------------------------------------------------------------------------------------------

    def host_view(self, chunk: int, payload: str) -> Array | None:
        """A payload in the host slab, if it has one there."""
        offset = self.engine.host_offset(chunk, payload)
        if offset is None:
            return None
        numel = self.layout.numel(chunk) if payload == "param" else self.layout.state_numel(chunk)
        dtype: np.dtype[Any] = np.dtype(np.float32)
        if payload == "param":
            dtype = PARAM_DTYPE[self.setup.precision]
        elif payload == "master":
            dtype = MASTER_DTYPE[self.setup.precision]
        return self.host[offset : offset + numel * dtype.itemsize].view(dtype)

    def device_views(self, chunk: int) -> dict[str, Array]:
        """Payloads of a chunk in bound device memory."""
        memory = self.memory[chunk]
        views: dict[str, Array] = {}
        if memory.param is not None:
            views["param"] = memory.param
        if memory.states is not None:
            n = self.layout.state_numel(chunk)
            start = 0
            if self.setup.precision in MASTER_DTYPE:
                master = MASTER_DTYPE[self.setup.precision]
                views["master"] = memory.states[: n * master.itemsize].view(master)
                start = n * master.itemsize
            views["exp_avg"] = memory.states[start : start + 4 * n].view(np.float32)
            views["exp_avg_sq"] = memory.states[start + 4 * n : start + 8 * n].view(np.float32)
        return views

    def fill(self) -> None:
        """Binds all device memory and writes the reference's payloads to wherever they live."""
        if self.setup.slab_bytes():
            self.engine.bind_slab(address(self.slab))
        self.engine.bind_staging(address(self.staging))
        for chunk, spec in enumerate(self.setup.chunks):
            memory = self.memory[chunk]
            if spec.home == "resident":
                memory.param = self.reference.param[chunk].copy()
                self.engine.bind(chunk, param=address(memory.param))
            if spec.cls == "device":
                self.bind_states(chunk)
            if spec.sums_on_device:
                self.bind_accumulator(chunk)
            self.write_payloads(chunk)

    def bind_states(self, chunk: int) -> None:
        """Binds states to a device-class chunk."""
        memory = self.memory[chunk]
        memory.states = np.zeros(max(self.layout.state_bytes(chunk), 1), np.uint8)
        self.engine.bind(chunk, states=address(memory.states))

    def bind_accumulator(self, chunk: int) -> None:
        """Binds an accumulator to a chunk whose gradients are added up on the device."""
        memory = self.memory[chunk]
        if self.setup.accumulation > 1 and memory.accumulator is None:
            memory.accumulator = np.full(max(self.layout.state_numel(chunk), 1), np.nan, np.float32)
            self.engine.bind(chunk, accumulator=address(memory.accumulator))

    def write_payloads(self, chunk: int) -> None:
        """Writes the reference's payloads of a chunk to host and device."""
        for payload, values in self.reference.payloads(chunk).items():
            host = self.host_view(chunk, payload)
            if host is not None:
                host[:] = values
            device = self.device_views(chunk).get(payload)
            if device is not None:
                device[:] = values

    def set_class(self, chunk: int, cls: str) -> None:
        """Moves a resident chunk to another class, carrying its states over."""
        self.engine.flush()
        before = self.states(chunk)
        stays = self.classes[chunk] != "device" and cls != "device"
        self.engine.set_class(chunk, cls)
        self.classes[chunk] = cls
        memory = self.memory[chunk]
        views: dict[str, Array | None]
        if cls == "device":
            self.bind_states(chunk)
            views = {**self.device_views(chunk)}
        else:
            memory.states = None
            views = {name: self.host_view(chunk, name) for name in before}
        if cls == "host":
            memory.accumulator = None
            param = self.host_view(chunk, "param")
            assert param is not None
            assert memory.param is not None
            param[:] = memory.param
        else:
            self.bind_accumulator(chunk)
        if stays:
            return
        for name, values in before.items():
            view = views[name]
            assert view is not None
            view[:] = values

    def states(self, chunk: int) -> dict[str, Array]:
        """Copies of the optimizer states of a chunk, from where its class keeps them."""
        names = ["exp_avg", "exp_avg_sq", *(["master"] if self.setup.precision in MASTER_DTYPE else [])]
        if self.classes[chunk] == "frozen" or self.layout.state_numel(chunk) == 0:
            return {}
        if self.classes[chunk] == "device":
            views = self.device_views(chunk)
            return {name: views[name].copy() for name in names}
        found = {name: self.host_view(chunk, name) for name in names}
        return {name: view.copy() for name, view in found.items() if view is not None}

    # ---- the step -----------------------------------------------------------------------------------------------

    def visible(self, chunk: int, slots: Mapping[int, int]) -> Array:
        """The parameters that the compute stream reads."""
        if chunk in slots:
            size = self.layout.param_bytes(chunk)
            return self.slab[slots[chunk] : slots[chunk] + size].view(PARAM_DTYPE[self.setup.precision])
        memory = self.memory[chunk].param
        assert memory is not None, f"streamed chunk {chunk} has no slot"
        return memory

    def check_visible(self, unit: int, slots: Mapping[int, int], when: str) -> None:
        """What a unit reads is the reference's current parameters, bit for bit."""
        for chunk in self.setup.unit_chunks()[unit]:
            same(self.visible(chunk, slots), self.reference.param[chunk], f"chunk {chunk} in unit {unit} {when}")

    def enter(self, unit: int, backward: bool = False) -> dict[int, int]:
        """Enters a unit and compares what it may read; returns the slots."""
        slots = dict(self.engine.enter(unit, backward, STREAM) or [])
        self.check_visible(unit, slots, "at enter")
        return slots

    def leave(self, unit: int, slots: Mapping[int, int], backward: bool = False) -> None:
        """Compares again (nothing moved meanwhile) and leaves."""
        self.check_visible(unit, slots, "before leave")
        self.engine.leave(unit, backward, STREAM)

    def forward(self, units: Iterable[int] | None = None) -> None:
        """A forward pass of some units."""
        for unit in range(len(self.setup.unit_chunks())) if units is None else units:
            slots = self.enter(unit)
            self.leave(unit, slots)

    def lend(self, chunk: int, grads: Mapping[int, Array]) -> int:
        """Hands gradients over, to the engine and to the reference."""
        self.reference.add_grads(chunk, grads)
        arrays = [np.ascontiguousarray(grad).copy() for grad in grads.values()]
        ticket = self.engine.grads(chunk, [(p, address(a)) for p, a in zip(grads, arrays, strict=True)], STREAM)
        assert ticket not in self.issued
        self.issued.add(ticket)
        self.lent[ticket] = arrays
        return ticket

    def collect(self) -> None:
        """Frees what the engine gives back, overwriting it: nobody may read it any more."""
        for ticket in self.engine.collect():
            assert ticket in self.lent, f"ticket {ticket} was collected twice or never issued"
            for array in self.lent.pop(ticket):
                bits(array)[:] = 0x7FC1
            self.collected.add(ticket)

    def backward(
        self,
        grads: Mapping[int, Mapping[int, Array]],
        units: Sequence[int] | None = None,
        grad_scale: float = 1.0,
        again: bool = False,
        late: bool = False,
    ) -> None:
        """A backward pass of some units; a chunk's gradients come in the last of its units, or (`late`) after all of them."""
        chunks = self.setup.unit_chunks()
        order = list(reversed(range(len(chunks)))) if units is None else list(units)
        last_unit = {chunk: unit for unit in order for chunk in chunks[unit]}
        pending = {c: g for c, g in grads.items() if g}
        self.engine.backward_begin(grad_scale)
        for unit in order:
            slots = self.enter(unit, backward=True)
            if again:
                # A recomputation: the forward runs again, inside its backward.
                self.leave(unit, self.enter(unit))
            for chunk in dict.fromkeys(chunks[unit]):
                if not late and chunk in pending and last_unit[chunk] == unit:
                    self.lend(chunk, pending.pop(chunk))
            self.leave(unit, slots, backward=True)
            self.collect()
        for chunk, late_grads in pending.items():
            self.lend(chunk, late_grads)
        self.engine.backward_end(STREAM)
        self.micro_step += 1

    def random_grads(self, seed: int, scale: float = 1.0, keep: float = 1.0) -> dict[int, dict[int, Array]]:
        """Gradients of a random subset of the trainable parameters, in the model's precision."""
        rng = np.random.default_rng(seed)
        grads: dict[int, dict[int, Array]] = {}
        for chunk, spec in enumerate(self.setup.chunks):
            for position, (numel, trainable) in enumerate(spec.params):
                if trainable and rng.random() < keep:
                    values = (rng.standard_normal(numel) * scale).astype(np.float32)
                    grads.setdefault(chunk, {})[position] = narrow(values, self.setup.precision)
        return grads

    def commit(self, grad_scale: float = 1.0) -> Decided:
        """`optimizer.step()` of both."""
        self.engine.commit(STREAM, grad_scale)
        self.micro_step = 0
        return self.reference.commit(grad_scale)

    def drop_grads(self) -> None:
        """`zero_grad()` of both."""
        self.engine.drop_grads()
        self.micro_step = 0
        self.reference.drop_grads()

    def step(self, seed: int, scale: float = 1.0, keep: float = 1.0, grad_scale: float = 1.0) -> None:
        """All micro-batches of a step, and its commit."""
        for micro in range(self.setup.accumulation):
            self.forward()
            self.backward(self.random_grads(seed * 10 + micro, scale, keep), grad_scale=grad_scale)
        self.commit(grad_scale)

    def set_hyper(self, groups: Sequence[Hyper], group_of_param: Sequence[int]) -> None:
        """Hyperparameters of both."""
        self.engine.set_hyper(groups, group_of_param)
        self.reference.groups = list(groups)
        self.reference.group_of_param = list(group_of_param)

    def set_max_norm(self, value: float | None) -> None:
        """The clip limit of both; an undecided step keeps the old one."""
        self.engine.decision(True)
        self.engine.max_norm = value
        self.reference.max_norm = value

    # ---- comparing ----------------------------------------------------------------------------------------------

    def check_decision(self) -> None:
        """The latest decision is the reference's, bit for bit."""
        got, want = self.engine.decision(True), self.reference.decided
        if want is None:
            assert got is None
            return
        assert got is not None
        assert (got[0], got[2], got[3]) == (want.step, want.coefficient, want.skipped)
        assert got[1] == want.norm or (math.isnan(got[1]) and math.isnan(want.norm))

    def flush_and_compare(self) -> None:
        """After a flush, every payload in every place is the reference's, and nothing is pending."""
        self.engine.flush()
        self.collect()
        for chunk in range(len(self.setup.chunks)):
            expected = self.reference.payloads(chunk)
            for payload, values in expected.items():
                host = self.host_view(chunk, payload)
                if host is not None:
                    same(host, values, f"host {payload} of chunk {chunk}")
                device = self.device_views(chunk).get(payload)
                if device is not None:
                    same(device, values, f"device {payload} of chunk {chunk}")
            assert self.engine.generation(chunk) == self.reference.generation[chunk]
        assert self.engine.param_steps() == self.reference.steps
        self.check_decision()
        for state in json.loads(self.engine.residency()):
            assert state["work"] == "idle", state
            assert state["grad"] in ("none", "partial", "landed"), state

    def check_invariants(self) -> None:
        """What must hold at every moment, whatever is going on."""
        states = json.loads(self.engine.residency())
        slab = self.setup.slab_bytes()
        occupied: list[tuple[int, int]] = []
        for chunk, state in enumerate(states):
            home = "host" if self.classes[chunk] == "host" or self.setup.chunks[chunk].home == "streamed" else "device"
            ((kind, where),) = state["param"].items()
            authority = where if isinstance(where, str) else where["home"]
            assert authority == home, f"chunk {chunk}: {state}"
            assert kind in ("at", "cached", "writing", "tentative"), state
            cached = isinstance(where, dict) and where["cache"] == "device"
            streamed = self.setup.chunks[chunk].home == "streamed"
            assert (state["slot"] is not None) == (streamed and cached), f"chunk {chunk}: {state}"
            if state["slot"] is not None:
                assert state["slot"] % SLOT_ALIGN == 0
                occupied.append((state["slot"], state["slot"] + state["bytes"]))
            generation = self.engine.generation(chunk)
            assert generation >= self.generations[chunk], f"chunk {chunk} went back to generation {generation}"
            assert generation <= self.reference.generation[chunk]
            self.generations[chunk] = generation
        occupied.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(occupied)), occupied
        assert all(end <= slab for _, end in occupied), (occupied, slab)
        stats = self.engine.stats()
        assert stats["device_bytes"] <= stats["device_peak_bytes"] <= stats["device_budget_bytes"]
        assert stats["host_bytes"] <= stats["host_peak_bytes"] <= stats["host_budget_bytes"]
        assert stats["slab_used_bytes"] <= slab
        bound = [slab, self.setup.staging_bytes(), *(self.layout.param_bytes(c) for c, m in enumerate(self.memory) if m.param is not None)]
        bound += [self.layout.state_bytes(c) for c, m in enumerate(self.memory) if m.states is not None]
        bound += [self.layout.grad_acc_bytes(c) for c, m in enumerate(self.memory) if m.accumulator is not None]
        assert stats["device_static_bytes"] == sum(bound)

    def finish(self) -> None:
        """Ends in order: everything equal, every ticket back exactly once, nothing left."""
        self.flush_and_compare()
        self.drop_grads()
        self.flush_and_compare()
        assert not self.lent
        assert self.collected == self.issued
        self.check_invariants()


def same(got: Array, want: Array, what: str) -> None:
    """Equality of bits, with the first difference in the message."""
    different = np.flatnonzero(bits(got) != bits(want))
    if different.size:
        first = different[0]
        values = f"{got[first]!r}, not {want[first]!r}"
        raise AssertionError(f"{what}: {different.size} of {want.size} elements differ, first at {first}: {values}")


def with_placement(setup: Setup, placement: str, **changes: Any) -> Setup:
    """The same model with every trainable chunk at "device", "resident" (host-class, resident), "streamed" (host-class) or
    "visiting" (states streamed)."""
    cls, home = {
        "device": ("device", "resident"),
        "resident": ("host", "resident"),
        "streamed": ("host", "streamed"),
        "visiting": ("streamed", "resident"),
    }[placement]
    chunks = tuple(
        replace(spec, cls=cls, home=home) if any(trainable for _, trainable in spec.params) else replace(spec, cls="frozen", home=home)
        for spec in setup.chunks
    )
    return replace(setup, chunks=chunks, **changes)
