"""Whatever happens in whatever order, the engine's bits are those of a synchronous optimizer over one flat model."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.engine_model import ADAMW, STREAM, ChunkSpec, Hyper, Rig, Setup, same, with_placement

NUMELS = st.sampled_from([1, 3, 64, 65, 130, 700])
SEEDS = st.integers(0, 2**16)
SCALES = st.sampled_from([1e-22, 1e-3, 1.0, 50.0])
GRAD_SCALES = st.sampled_from([1.0, 0.125, 1.0 / 3.0])
MAX_NORMS = st.sampled_from([None, 1e-3, 5.0, 1e6])
SPEEDS = st.sampled_from([None, 2e7, 4e6])


@st.composite
def chunk_specs(draw: st.DrawFn) -> ChunkSpec:
    """A chunk of one to three parameters, anywhere it may be."""
    params = tuple(draw(st.lists(st.tuples(NUMELS, st.integers(0, 3).map(bool)), min_size=1, max_size=3)))
    if not any(trainable for _, trainable in params):
        return ChunkSpec(params, "frozen", draw(st.sampled_from(["streamed", "resident"])))
    places = [("host", "streamed"), ("host", "streamed"), ("host", "resident"), ("device", "resident"), ("streamed", "resident")]
    cls, home = draw(st.sampled_from(places))
    return ChunkSpec(params, cls, home, draw(st.sampled_from(["host", "device"])))


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """Two to five chunks in units that may share them, behind links of any speed."""
    chunks = tuple(draw(st.lists(chunk_specs(), min_size=2, max_size=5)))
    units = [[c] for c in range(len(chunks))]
    for _ in range(draw(st.integers(0, 2))):
        # Tied weights, and chunks that one operation reads side by side.
        unit, chunk = draw(st.integers(0, len(units) - 1)), draw(st.integers(0, len(chunks) - 1))
        if chunk not in units[unit]:
            units[unit].insert(draw(st.integers(0, len(units[unit]))), chunk)
    return Setup(
        chunks=chunks,
        units=tuple(tuple(unit) for unit in units),
        precision=draw(st.sampled_from(["bf16", "fp16", "fp32"])),
        slab_extra_bytes=draw(st.sampled_from([0, 0, 256, 1024, 1 << 16])),
        piece_numel=draw(st.sampled_from([64, 128, 1024])),
        accumulation=draw(st.integers(1, 3)),
        clip_mode=draw(st.sampled_from(["defer", "speculate", "speculate", "auto"])),
        undo_bytes=draw(st.sampled_from([0, 4096, 1 << 18])),
        late_moments=draw(st.booleans()),
        landing_buffers=draw(st.integers(2, 4)),
        grad_in_flight_bytes=draw(st.sampled_from([1, 2048, 1 << 20])),
        max_norm=draw(MAX_NORMS),
        threads=draw(st.integers(1, 2)),
        h2d_bytes_per_second=draw(SPEEDS),
        d2h_bytes_per_second=draw(SPEEDS),
        latency_ns=draw(st.sampled_from([0, 0, 200_000])),
        seed=draw(SEEDS),
    )


@st.composite
def hypers(draw: st.DrawFn) -> Hyper:
    """Hyperparameters of one group."""
    return (
        draw(st.sampled_from([0.0, 1e-3, 0.1])),
        draw(st.sampled_from([0.0, 0.9])),
        draw(st.sampled_from([0.95, 0.999])),
        draw(st.sampled_from([1e-8, 1e-3])),
        draw(st.sampled_from([0.0, 0.1])),
        draw(st.booleans()),
    )


class EngineMachine(RuleBasedStateMachine):
    """Random histories of everything that a training loop may do."""

    rig: Rig

    @initialize(setup=setups())
    def build(self, setup: Setup) -> None:
        self.rig = Rig(setup)
        self.accounted = 0
        self.touched: set[int] = set()

    def units(self, mask: int, reverse: bool = False) -> list[int]:
        """The units whose bit is set."""
        units = [u for u in range(len(self.rig.setup.unit_chunks())) if mask >> u & 1]
        return units[::-1] if reverse else units

    @rule(mask=st.one_of(st.just(31), st.integers(0, 31)), repeat=st.integers(1, 2))
    def forward(self, mask: int, repeat: int) -> None:
        """A forward pass, or an evaluation of some units."""
        for _ in range(repeat):
            self.rig.forward(self.units(mask))
        self.boundary(mask)

    def boundary(self, mask: int = 31) -> None:
        """Operations end the reads of touched chunks."""
        if mask:
            self.touched.clear()

    def backward(self, mask: int, seed: int, scale: float, keep: float, grad_scale: float, late: bool, again: bool, poison: Any) -> None:
        units = self.units(mask, reverse=True)
        grads = self.rig.random_grads(seed, scale, keep)
        reached = {c for u in units for c in self.rig.setup.unit_chunks()[u]}
        grads = {chunk: found for chunk, found in grads.items() if chunk in reached}
        if poison is not None and grads:
            # One element that is not finite, somewhere.
            first = next(iter(next(iter(grads.values())).values()))
            first[first.size // 2] = {"bf16": 0x7F80, "fp16": poison, "fp32": poison}[self.rig.setup.precision]
        self.rig.backward(grads, units, grad_scale=grad_scale, again=again, late=late)
        self.boundary()

    @precondition(lambda self: self.rig.micro_step < self.rig.setup.accumulation)
    @rule(
        mask=st.one_of(st.just(31), st.integers(0, 31)),
        seed=SEEDS,
        scale=SCALES,
        keep=st.sampled_from([1.0, 0.6]),
        grad_scale=GRAD_SCALES,
        late=st.booleans(),
        again=st.booleans(),
        poison=st.sampled_from([None] * 6 + [np.inf, np.nan]),
    )
    def backward_pass(self, **drawn: Any) -> None:
        """A backward pass that reaches some units and gives some of their parameters gradients."""
        self.backward(**drawn)

    @precondition(lambda self: self.rig.micro_step in (0, self.rig.setup.accumulation))
    @rule(grad_scale=GRAD_SCALES)
    def commit(self, grad_scale: float) -> None:
        self.rig.commit(grad_scale)
        self.boundary()

    @rule(seed=SEEDS, scale=SCALES, keep=st.sampled_from([1.0, 0.6]), grad_scale=GRAD_SCALES, pause=st.sampled_from([0.0, 0.002]))
    def whole_step(self, seed: int, scale: float, keep: float, grad_scale: float, pause: float) -> None:
        """What is left of a step: the usual order, perhaps with time for speculation before the commit."""
        while self.rig.micro_step < self.rig.setup.accumulation:
            self.rig.forward()
            self.backward(31, seed + self.rig.micro_step, scale, keep, grad_scale, late=False, again=False, poison=None)
        time.sleep(pause)
        self.rig.commit(grad_scale)
        self.boundary()

    @rule()
    def drop_grads(self) -> None:
        self.rig.drop_grads()

    @rule()
    def flush(self) -> None:
        """A flush at any moment shows the decided state, whatever was speculated."""
        self.rig.flush_and_compare()

    @rule()
    def decision(self) -> None:
        self.rig.check_decision()

    @rule(groups=st.lists(hypers(), min_size=1, max_size=2), choice=SEEDS)
    def set_hyper(self, groups: list[Hyper], choice: int) -> None:
        count = self.rig.reference.num_params
        self.rig.set_hyper(groups, [(choice >> p) % len(groups) for p in range(count)])

    @rule(value=MAX_NORMS)
    def set_max_norm(self, value: float | None) -> None:
        self.rig.set_max_norm(value)

    @rule(choice=SEEDS)
    def touch(self, choice: int) -> None:
        """A chunk read outside the traced operations shows the current parameters too."""
        streamed = [c for c, spec in enumerate(self.rig.setup.chunks) if spec.home == "streamed"]
        if streamed:
            chunk = streamed[choice % len(streamed)]
            if self.touched - {chunk} and self.rig.setup.slab_extra_bytes < 1 << 16:
                return  # Earlier touches keep their slots until the next operation, and the slab may be too small for one more.
            slot = self.rig.engine.touch(chunk, STREAM)
            self.touched.add(chunk)
            got = self.rig.visible(chunk, {chunk: slot})
            same(got, self.rig.reference.param[chunk], f"touched chunk {chunk}")

    @precondition(lambda self: self.rig.micro_step == 0)
    @rule(choice=SEEDS)
    def set_class(self, choice: int) -> None:
        """A resident chunk changes its class between steps without changing a bit."""
        movable = [c for c, spec in enumerate(self.rig.setup.chunks) if spec.home == "resident" and spec.cls != "frozen"]
        if movable:
            chunk = movable[choice % len(movable)]
            others = [cls for cls in ("device", "host", "streamed") if cls != self.rig.classes[chunk]]
            self.rig.set_class(chunk, others[choice // len(movable) % 2])
            self.rig.flush_and_compare()

    @rule(delta=st.integers(-1000, 1000))
    def account(self, delta: int) -> None:
        delta = max(delta, -self.accounted)
        self.rig.engine.account("activations", delta)
        self.accounted += delta
        assert self.rig.engine.stats()["device_activations_bytes"] == self.accounted

    @rule(milliseconds=st.sampled_from([0.3, 2.0]))
    def wait(self, milliseconds: float) -> None:
        """Workers get time to finish what nobody asked for yet."""
        time.sleep(milliseconds / 1000)

    @rule()
    def collect(self) -> None:
        self.rig.collect()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check_invariants()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.finish()


class TestEngineMachine(EngineMachine.TestCase):  # type: ignore[misc, valid-type]
    """Runs the machine."""

    settings = settings(max_examples=150, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
    pytestmark = [pytest.mark.timeout(120)]


MODEL = Setup(
    chunks=(
        ChunkSpec(((700, True), (65, True))),
        ChunkSpec(((130, True), (3, False))),
        ChunkSpec(((1500, True),)),
        ChunkSpec(((300, False),)),
    ),
    units=((0,), (1, 3), (2,), (0, 1)),
    max_norm=30.0,
)


@pytest.mark.timeout(120)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    placement=st.sampled_from(["device", "resident", "streamed", "visiting"]),
    late_moments=st.booleans(),
    clip_mode=st.sampled_from(["defer", "speculate", "auto"]),
    accumulation=st.integers(1, 2),
    h2d=st.sampled_from([None, 1e8, 3e6]),
    d2h=st.sampled_from([None, 1e8, 3e6]),
    latency_ns=st.sampled_from([0, 50_000, 1_000_000]),
    sleeps=st.lists(st.sampled_from([0.0, 0.0, 0.001]), min_size=4, max_size=4),
    slab_extra_bytes=st.sampled_from([0, 8192]),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
)
def test_timing_changes_no_bit(
    placement: str,
    late_moments: bool,
    clip_mode: str,
    accumulation: int,
    h2d: float | None,
    d2h: float | None,
    latency_ns: int,
    sleeps: list[float],
    slab_extra_bytes: int,
    precision: str,
) -> None:
    """Slow links, latencies and pauses of the caller change the order of events, never a weight, and nothing waits for ever."""
    setup = with_placement(
        MODEL,
        placement,
        precision=precision,
        late_moments=late_moments,
        clip_mode=clip_mode,
        accumulation=accumulation,
        h2d_bytes_per_second=h2d,
        d2h_bytes_per_second=d2h,
        latency_ns=latency_ns,
        slab_extra_bytes=slab_extra_bytes,
        threads=2,
        undo_bytes=60_000,
    )
    rig = Rig(setup)
    for number, pause in enumerate(sleeps):
        # Norms on both sides of the limit.
        rig.set_hyper([(*ADAMW[:4], 0.1 * number, number % 2 == 0)], [0] * rig.reference.num_params)
        for micro in range(accumulation):
            rig.forward()
            rig.backward(rig.random_grads(number * 7 + micro, scale=0.05 if number % 2 else 3.0, keep=0.8))
        time.sleep(pause)
        rig.commit()
        rig.check_invariants()
    rig.finish()


@pytest.mark.parametrize("placement", ["device", "resident", "streamed", "visiting"])
@pytest.mark.parametrize("clip_mode", ["defer", "speculate"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_norm_is_summed_in_parameter_order(placement: str, clip_mode: str, order: tuple[int, int]) -> None:
    """Whatever arrives first: sixteen squares of 2^-54 vanish beside a 1 that comes before them, and would not if they were added first."""
    chunks = (ChunkSpec(((1, True),)), ChunkSpec(((1, True),) * 16))
    rig = Rig(with_placement(Setup(chunks=chunks, max_norm=1.0), placement, clip_mode=clip_mode))
    rig.engine.backward_begin()
    for chunk in order:
        value = 1.0 if chunk == 0 else 2.0**-27
        rig.lend(chunk, {position: np.full(1, value, np.float32) for position in range(len(chunks[chunk].params))})
    rig.engine.backward_end(STREAM)
    rig.commit()
    decision = rig.engine.decision(True)
    assert decision is not None
    assert decision[1] == 1.0
    rig.finish()


def test_gradients_of_the_next_batch_do_not_join_an_undecided_step() -> None:
    """A batch that reaches none of the undecided chunks waits for the decision before its backward, and is a step of its own."""
    setup = with_placement(MODEL, "streamed", d2h_bytes_per_second=50_000.0)
    rig = Rig(setup)
    grads = rig.random_grads(1)
    rig.backward({2: grads[2]}, [2])
    rig.commit()
    # Unit 0 reads nothing that the first step rewrites.
    rig.forward([0])
    rig.backward({0: grads[0]}, [0])
    rig.commit()
    rig.finish()
    assert rig.engine.stats()["steps"] == 2
    assert rig.engine.param_steps() == [1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("placement", ["device", "resident", "streamed", "visiting"])
def test_dropping_gradients_of_earlier_micro_batches(placement: str) -> None:
    """Gradients that came in the first of two micro-batches only are being reduced when they are dropped: nothing is left of them."""
    rig = Rig(with_placement(MODEL, placement, accumulation=2, threads=2))
    for number in range(20):
        rig.backward(rig.random_grads(number))
        rig.backward({}, [2])
        rig.drop_grads()
    rig.step(1)
    rig.finish()


def test_reading_beside_a_speculated_chunk_keeps_its_decided_copy() -> None:
    """An evaluation before the commit reads a chunk that was stepped ahead, beside one that has to be fetched.

    The decided copy may not leave for it, because it could not be fetched again.
    """
    chunks = tuple(ChunkSpec(((numel, True),)) for numel in (640, 128, 128))
    # After the backward, chunk 2 lies where chunk 1 was, and is needed again before chunk 0 is.
    rig = Rig(Setup(chunks=chunks, units=((2,), (1, 0), (2,)), clip_mode="speculate"))
    rig.forward()
    rig.backward(rig.random_grads(1))
    deadline = time.monotonic() + 10
    while any(state["work"] != "speculated" for state in json.loads(rig.engine.residency())) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [state["slot"] is not None for state in json.loads(rig.engine.residency())] == [True, False, True]
    rig.forward([1])
    rig.commit()
    rig.finish()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_states_come_in_again_only_when_they_are_back(precision: str) -> None:
    """A slow way back: the next step finds a free buffer at once, but the states of the step before are not at home yet."""
    setup = Setup(chunks=(ChunkSpec(((700, True),), "streamed", "resident"),), precision=precision, piece_numel=1024)
    rig = Rig(replace(setup, d2h_bytes_per_second=2e5))
    for number in range(4):
        rig.step(number)
    rig.finish()
    assert rig.engine.stats()["states_visited_bytes"] == 4 * rig.layout.state_bytes(0)


def test_a_class_changes_only_when_the_states_are_back() -> None:
    """Between a step and its flush the states may be on the device: moving them then would lose the step."""
    rig = Rig(Setup(chunks=(ChunkSpec(((700, True),), "streamed", "resident"),), d2h_bytes_per_second=2e4))
    rig.step(1)
    rig.engine.decision(True)
    with pytest.raises(ValueError, match="the states of `chunk0` are still on the device; call flush before its class changes"):
        rig.engine.set_class(0, "device")
    rig.set_class(0, "device")
    rig.step(2)
    rig.set_class(0, "streamed")
    rig.step(3)
    rig.finish()
