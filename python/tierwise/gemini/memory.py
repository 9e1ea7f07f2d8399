"""Where the bytes of every chunk are: device tensors, the pinned host slab, and views of parameters and states in them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from tierwise import _core
from tierwise._core import Engine, Layout
from tierwise.gemini.chunking import Grouping
from tierwise.gemini.target import DTYPES, Target

_MASTER = {"bf16": torch.int16, "fp16": torch.float32}


class ChunkMemory:
    """Owns the device memory of a plan and reads and writes payloads; the engine moves them in between."""

    def __init__(self, engine: Engine, layout: Layout, grouping: Grouping, plan: dict[str, Any], target: Target) -> None:
        self.engine = engine
        self.layout = layout
        self.precision = layout.precision
        self.dtype = DTYPES[self.precision]
        self.target = target
        self.plan = plan
        self.started = False
        self.shapes = [[param.shape for param in chunk.params] for chunk in grouping.chunks]
        self.offsets = [layout.param_offsets(chunk) for chunk in range(layout.num_chunks)]
        self.resident: dict[int, Tensor] = {}
        self.states: dict[int, Tensor] = {}
        self.accumulators: dict[int, Tensor] = {}
        self.slab: Tensor | None = None
        self.staging: Tensor | None = None
        self.host = (
            torch.frombuffer(engine.host_buffer, dtype=torch.uint8) if len(engine.host_buffer) else torch.empty(0, dtype=torch.uint8)
        )
        self._allocate()

    def _allocate(self) -> None:
        def zeros(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.uint8, device=self.target.torch_device)

        for chunk, placed in enumerate(self.plan["chunks"]):
            param = states = accumulator = None
            if placed["home"] not in ("streamed", "fetched"):
                param = self.resident[chunk] = zeros(self.layout.param_bytes(chunk))
            if placed["class"] == "device":
                states = self.states[chunk] = zeros(self.layout.state_bytes(chunk))
            if placed["class"] != "frozen" and placed["accumulate"] == "device" and self.plan["accumulation"] > 1:
                accumulator = self.accumulators[chunk] = zeros(self.layout.grad_acc_bytes(chunk))
            self.engine.bind(
                chunk,
                param=None if param is None else param.data_ptr(),
                states=None if states is None else states.data_ptr(),
                accumulator=None if accumulator is None else accumulator.data_ptr(),
            )
        if self.plan["stream_slab_bytes"]:
            self.slab = zeros(self.plan["stream_slab_bytes"])
            self.engine.bind_slab(self.slab.data_ptr())
        if self.plan["device"]["staging"]:
            self.staging = zeros(self.plan["device"]["staging"])
            self.engine.bind_staging(self.staging.data_ptr())

    def move_to_device(self, chunk: int) -> None:
        """Gives a flushed chunk with states in host memory to the device class, states and all; streamed parameters become resident."""
        param = None
        if chunk not in self.resident:
            home = self._host_payload(chunk, "param")
            assert home is not None
            param = home.to(self.target.torch_device, copy=True)
        states = torch.empty(self.layout.state_bytes(chunk), dtype=torch.uint8, device=self.target.torch_device)
        offset = 0
        for payload in ("master", "exp_avg", "exp_avg_sq"):
            source = self._host_payload(chunk, payload)
            if source is not None:
                states[offset : offset + source.numel()].copy_(source)
                offset += source.numel()
        self.target.synchronize()
        accumulator = None
        if self.plan["accumulation"] > 1 and chunk not in self.accumulators:
            accumulator = torch.zeros(self.layout.grad_acc_bytes(chunk), dtype=torch.uint8, device=self.target.torch_device)
        self.engine.bind(
            chunk,
            param=None if param is None else param.data_ptr(),
            states=states.data_ptr(),
            accumulator=None if accumulator is None else accumulator.data_ptr(),
        )
        self.engine.set_class(chunk, "device")
        self.states[chunk] = states
        if param is not None:
            self.resident[chunk] = param
        if accumulator is not None:
            self.accumulators[chunk] = accumulator
        self.plan["chunks"][chunk].update({"class": "device", "home": "resident", "accumulate": "device"})

    def _state_bytes(self, payload: str) -> int:
        if payload == "master":
            return {"bf16": 2, "fp16": 4, "fp32": 0}[self.precision]
        return 4

    def _host_payload(self, chunk: int, payload: str) -> Tensor | None:
        offset = self.engine.host_offset(chunk, payload)
        if offset is None:
            return None
        numel = self.layout.numel(chunk) if payload == "param" else self.layout.state_numel(chunk)
        size = self.dtype.itemsize if payload == "param" else self._state_bytes(payload)
        return self.host[offset : offset + numel * size]

    def _view(self, flat: Tensor, dtype: torch.dtype, chunk: int, position: int) -> Tensor:
        shape = self.shapes[chunk][position]
        start = self.offsets[chunk][position] * dtype.itemsize
        return flat[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def views(self, flat: Tensor, chunk: int) -> list[Tensor]:
        """Parameters of a chunk as views of its payload bytes."""
        return [self._view(flat, self.dtype, chunk, position) for position in range(len(self.shapes[chunk]))]

    def slot_views(self, chunk: int, slot: int) -> list[Tensor]:
        """Parameters of a streamed chunk as views of its slot."""
        assert self.slab is not None
        return self.views(self.slab[slot : slot + self.layout.param_bytes(chunk)], chunk)

    # ---- reading and writing, after a flush ---------------------------------------------------------------------

    def read_param(self, chunk: int, position: int) -> Tensor:
        """The parameter in the model's dtype: a view of where it is authoritative, or what the disk has in a fresh CPU tensor.

        Call `engine.flush` first.
        """
        if chunk in self.resident and (self.plan["chunks"][chunk]["class"] not in ("host", "nvme") or self._is_spilled(chunk, "param")):
            return self._view(self.resident[chunk], self.dtype, chunk, position)
        if self._is_spilled(chunk, "param"):
            return self._read_spilled(chunk, position, "param", self.dtype)
        payload = self._host_payload(chunk, "param")
        assert payload is not None
        return self._view(payload, self.dtype, chunk, position)

    def _read_spilled(self, chunk: int, position: int, payload: str, dtype: torch.dtype) -> Tensor:
        value = torch.empty(self.shapes[chunk][position], dtype=dtype)
        self.engine.read_spilled(chunk, payload, self.offsets[chunk][position], value.numel(), value.data_ptr())
        return value

    def _is_spilled(self, chunk: int, payload: str) -> bool:
        placed = self.plan["chunks"][chunk]
        if payload == "param":
            return bool(placed["home"] in ("spilled", "fetched"))
        return bool(placed["class"] == "nvme")

    def read_state(self, chunk: int, position: int, payload: str) -> Tensor:
        """The payload "master" (bf16: int16 low half), "exp_avg" or "exp_avg_sq": a view, or what the disk has in a fresh CPU tensor.

        To change it there is `set_state`.
        """
        dtype = self._state_dtype(payload)
        if self._is_spilled(chunk, payload):
            return self._read_spilled(chunk, position, payload, dtype)
        host = self._host_payload(chunk, payload)
        if self.plan["chunks"][chunk]["class"] in ("host", "streamed"):
            assert host is not None
            return self._view(host, dtype, chunk, position)
        numel = self.layout.state_numel(chunk)
        start = 0
        for name in ("master", "exp_avg", "exp_avg_sq"):
            size = numel * self._state_bytes(name)
            if name == payload:
                return self._view(self.states[chunk][start : start + size], dtype, chunk, position)
            start += size
        raise AssertionError(payload)

    def _state_dtype(self, payload: str) -> torch.dtype:
        return _MASTER[self.precision] if payload == "master" else torch.float32

    def set_state(self, chunk: int, position: int, payload: str, value: Tensor) -> None:
        """Sets "master", "exp_avg" or "exp_avg_sq" from a tensor of the same shape, or of one element."""
        if not self._is_spilled(chunk, payload):
            self.read_state(chunk, position, payload).copy_(value)
            return
        self._write_spilled(chunk, position, payload, value.to(device="cpu", dtype=self._state_dtype(payload)))

    def _write_spilled(self, chunk: int, position: int, payload: str, value: Tensor) -> None:
        value = value.expand(self.shapes[chunk][position]).contiguous()
        self.engine.write_spilled(chunk, payload, self.offsets[chunk][position], value.numel(), value.data_ptr())

    def read_master(self, chunk: int, position: int) -> Tensor:
        """The fp32 master of a parameter, a fresh CPU tensor; exact."""
        if self.precision == "fp32":
            return self.read_param(chunk, position).detach().cpu().clone()
        if self.precision == "fp16":
            return self.read_state(chunk, position, "master").cpu().clone()
        hi = self.read_param(chunk, position).cpu().contiguous()
        lo = self.read_state(chunk, position, "master").cpu().contiguous()
        master = torch.empty(hi.shape, dtype=torch.float32)
        _core.join_master(hi.data_ptr(), lo.data_ptr(), master.data_ptr(), master.numel())
        return master

    def write_param(self, chunk: int, position: int, value: Tensor, trainable: bool) -> None:
        """Sets a parameter from a tensor of any float dtype; fp32 values become the exact master.

        A value that equals the parameter in the model's dtype keeps the master's low bits, so loading a checkpoint of model weights
        after one of optimizer state loses nothing.
        """
        if value.shape != self.shapes[chunk][position]:
            raise ValueError(f"expected shape {tuple(self.shapes[chunk][position])}, got {tuple(value.shape)}")
        value = value.detach()
        if trainable and self.precision != "fp32":
            if value.dtype == self.dtype and self.started:
                old = self.read_param(chunk, position)
                master = self.read_state(chunk, position, "master")
                same = value.to(old.device) == old
                fresh = torch.zeros_like(master) if self.precision == "bf16" else value.to(old.device).float()
                self.set_state(chunk, position, "master", torch.where(same.to(master.device), master, fresh.to(master.device)))
            elif self.precision == "fp16":
                self.set_state(chunk, position, "master", value)
            elif value.dtype == torch.bfloat16:
                if self.started or not self._is_spilled(chunk, "master"):  # What was never written reads as zeros.
                    self.set_state(chunk, position, "master", torch.zeros((), dtype=torch.int16))
            else:
                full = value.to(device="cpu", dtype=torch.float32).contiguous()
                value = torch.empty(full.shape, dtype=torch.bfloat16)
                low = torch.empty(full.shape, dtype=torch.int16)
                _core.split_master(full.data_ptr(), value.data_ptr(), low.data_ptr(), full.numel())
                self.set_state(chunk, position, "master", low)
        if self._is_spilled(chunk, "param"):
            self._write_spilled(chunk, position, "param", value.to(device="cpu", dtype=self.dtype))
        host = self._host_payload(chunk, "param")
        if host is not None:
            self._view(host, self.dtype, chunk, position).copy_(value)
        if chunk in self.resident:
            self._view(self.resident[chunk], self.dtype, chunk, position).copy_(value)
        elif self.started:
            # A clean copy may be in a slot: it has to say the same.
            slot = json.loads(self.engine.residency())[chunk]["slot"]
            if slot is not None:
                self.slot_views(chunk, slot)[position].copy_(value)

    def write_state(self, chunk: int, position: int, payload: str, value: Tensor) -> None:
        """Sets "exp_avg" or "exp_avg_sq" (fp32)."""
        self.set_state(chunk, position, payload, value)
