"""The engine on CUDA gives the bits of the engine on the emulated device, wherever chunks live."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch", reason="needs torch: install tierwise[train]")

import torch

from tierwise import _core

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SIZES = [[("a.w", 300_001, True), ("a.b", 77, True)], [("b.w", 200_000, True), ("b.f", 1000, False)], [("c.w", 65_537, True)]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PIECE_BYTES = {"bf16": 10, "fp16": 12, "fp32": 8}
"""Bytes of optimizer state of one element."""
HYPER = [(1e-2, 0.9, 0.99, 1e-8, 0.1, True), (3e-3, 0.8, 0.95, 1e-6, 0.0, False)]
STEPS = 4


def make_trace() -> str:
    units = [
        {"name": n, "chunks": [i], "saved_bytes": 0, "input_bytes": 0, "recomputable": True, "flops": 1.0} for i, n in enumerate("abc")
    ]
    ops = [{"unit": u, "phase": "forward"} for u in (0, 1, 2)] + [{"unit": u, "phase": "backward"} for u in (2, 1, 0)]
    return json.dumps({"units": units, "ops": ops, "outer_saved_bytes": 0})


def make_plan(layout: _core.Layout, classes: list[tuple[str, str]], accumulation: int, clip_mode: str, sums: str, late: bool) -> str:
    streamed = [layout.param_bytes(i) for i, (_, home) in enumerate(classes) if home == "streamed"]
    slab = -(-max(streamed, default=0) // 256) * 256 * (2 if streamed else 0)
    buffers = 3 if late else 2
    staging = buffers * max(layout.grad_bytes(i) for i in range(3)) if accumulation > 1 else 0
    # Less than a chunk's states: they visit the device in several pieces.
    visiting = 3 * 20_032 * PIECE_BYTES[layout.precision] if any(cls == "streamed" for cls, _ in classes) else 0
    zeros = ("resident_params", "states", "stream_slab", "accumulators", "gradients", "activations", "reserve")
    return json.dumps(
        {
            "version": 1,
            "chunks": [{"class": c, "home": h, "accumulate": "device" if c in ("device", "streamed") else sums} for c, h in classes],
            "activations": ["keep"] * 3,
            "offload_window_bytes": 0,
            "stream_slab_bytes": slab,
            "grad_in_flight_bytes": 1_000_000,
            "accumulation": accumulation,
            "clip_mode": clip_mode,
            "late_moments": late,
            "landing_buffers": buffers,
            "undo_bytes": 20_000_000 if clip_mode != "defer" else 0,
            "device": {**dict.fromkeys(zeros, 0), "staging": visiting},
            "device_peak_op": 0,
            "host": {"params": 0, "states": 0, "gradients": 0, "staging": staging, "undo": 0},
            "fetches": [],
            "predicted_step_s": 0.0,
            "bound_by": "compute",
        }
    )


def train(
    device: str,
    precision: str,
    classes: list[tuple[str, str]],
    accumulation: int,
    clip_mode: str,
    max_norm: float | None,
    sums: str = "host",
    late: bool = False,
) -> tuple[list[torch.Tensor], list[float]]:
    """Trains synthetic gradients that depend on the weights read; gives the final weights and the norms."""
    dtype, layout = DTYPES[precision], _core.Layout(precision, [(n, s) for n, s in zip("abc", SIZES, strict=True)])
    where = "cuda" if device == "cuda" else "cpu"
    engine = _core.Engine(
        layout,
        make_trace(),
        make_plan(layout, classes, accumulation, clip_mode, sums, late),
        _core.Device.cuda(0) if device == "cuda" else _core.Device.emulated(),
        device_budget=10**9,
        host_budget=10**9,
        max_norm=max_norm,
        threads=2,
    )
    host = torch.frombuffer(memoryview(engine.host_buffer), dtype=torch.uint8) if len(engine.host_buffer) else None
    generator = torch.Generator().manual_seed(0)
    resident: list[torch.Tensor | None] = []
    alive: list[torch.Tensor] = []
    for c, (cls, home) in enumerate(classes):
        numel, states = layout.numel(c), layout.state_numel(c)
        master = torch.randn(numel, generator=generator)
        low = torch.zeros(numel, dtype=torch.int16)
        param = master.to(dtype)
        if precision == "bf16":
            _core.split_master(master.data_ptr(), param.data_ptr(), low.data_ptr(), numel)
        halves = {"bf16": low[:states], "fp16": master[:states], "fp32": torch.empty(0)}[precision].contiguous().view(torch.uint8)

        def fill(payload: str, value: torch.Tensor, c: int = c) -> None:
            offset = engine.host_offset(c, payload)
            if offset is not None and value.numel():
                assert host is not None
                host[offset : offset + value.numel()] = value

        fill("param", param.view(torch.uint8))
        fill("master", halves)
        if home == "resident":
            bound = param.to(where)
            resident.append(bound)
            engine.bind(c, param=bound.data_ptr())
        else:
            resident.append(None)
        if cls == "device":
            state = torch.cat([halves, torch.zeros(states * 8, dtype=torch.uint8)]).to(where)
            alive.append(state)
            engine.bind(c, states=state.data_ptr())
        if accumulation > 1 and (sums == "device" or cls in ("device", "streamed")):
            accumulator = torch.empty(states, device=where)
            alive.append(accumulator)
            engine.bind(c, accumulator=accumulator.data_ptr())
    plan = json.loads(make_plan(layout, classes, accumulation, clip_mode, sums, late))
    slab_bytes, staging_bytes = plan["stream_slab_bytes"], plan["device"]["staging"]
    slab = torch.zeros(max(slab_bytes, 1), dtype=torch.uint8, device=where)
    if slab_bytes:
        engine.bind_slab(slab.data_ptr())
    staging = torch.full((max(staging_bytes, 1),), 255, dtype=torch.uint8, device=where)
    if staging_bytes:
        engine.bind_staging(staging.data_ptr())
    if device == "cuda":
        # The first fetches write the slab on a stream of their own: they must not come before its zeros.
        torch.cuda.synchronize()
    engine.start()
    engine.set_hyper(HYPER, [0, 1, 0, -1, 1])
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    norms = []
    tickets: dict[int, list[torch.Tensor]] = {}

    def view(c: int, slots: list[tuple[int, int]] | None) -> torch.Tensor:
        bound = resident[c]
        if bound is not None:
            return bound
        assert slots is not None
        offset = dict(slots)[c]
        return slab[offset : offset + layout.param_bytes(c)].view(dtype)

    for step in range(STEPS):
        for micro in range(accumulation):
            read = []
            for unit in range(3):
                read.append(view(unit, engine.enter(unit, False, stream)).clone())
                engine.leave(unit, False, stream)
            engine.backward_begin()
            for unit in (2, 1, 0):
                again = view(unit, engine.enter(unit, True, stream))
                assert torch.equal(again, read[unit])
                grads = []
                for position, ((_, numel, trainable), offset) in enumerate(zip(SIZES[unit], layout.param_offsets(unit), strict=True)):
                    if trainable:
                        # Exact in every dtype and on every device, so that both engines see the same gradients.
                        grad = (read[unit][offset : offset + numel] * (0.5 ** (step + micro))).contiguous()
                        grads.append((position, grad))
                ticket = engine.grads(unit, [(p, g.data_ptr()) for p, g in grads], stream)
                tickets[ticket] = [g for _, g in grads]
                engine.leave(unit, True, stream)
                for done in engine.collect():
                    del tickets[done]
            engine.backward_end(stream)
        engine.commit(stream)
        decision = engine.decision(True)
        assert decision is not None
        norms.append(decision[1])
    engine.flush()
    for done in engine.collect():
        del tickets[done]
    assert not tickets
    weights = []
    for c in range(3):
        kept = resident[c]
        if kept is not None:
            weights.append(kept.cpu().clone())
        else:
            start = engine.host_offset(c, "param")
            assert host is not None and start is not None
            weights.append(host[start : start + layout.param_bytes(c)].view(dtype).clone())
    return weights, norms


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_cuda_equals_emulated_bit_for_bit(precision: str, accumulation: int, max_norm: float | None) -> None:
    everything = [("device", "resident")] * 3
    expected, norms = train("emulated", precision, everything, accumulation, "defer", max_norm)
    placements = [
        (everything, "defer"),
        ([("host", "resident")] * 3, "defer"),
        ([("host", "streamed")] * 3, "defer"),
        ([("device", "resident"), ("host", "resident"), ("host", "streamed")], "defer"),
        ([("host", "resident"), ("host", "streamed"), ("device", "resident")], "speculate"),
        ([("streamed", "resident")] * 3, "defer"),
        ([("streamed", "resident"), ("device", "resident"), ("host", "streamed")], "defer"),
        ([("host", "resident"), ("streamed", "resident"), ("streamed", "resident")], "speculate"),
    ]
    for sums in ["host", "device"] if accumulation > 1 else ["host"]:
        for classes, clip_mode in placements:
            for late in [False, True] if ("host", "streamed") in classes else [False]:
                weights, got = train("cuda", precision, classes, accumulation, clip_mode, max_norm, sums, late)
                assert got == norms, (classes, clip_mode, sums, late)
                for a, b in zip(weights, expected, strict=True):
                    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (classes, clip_mode, sums, late)
