"""What the engine does when something fails or is asked for wrongly: it says so with numbers, and it neither hangs nor loses a bit."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.engine_model import ADAMW, STREAM, ChunkSpec, Rig, Setup, address, same, with_placement
from tierwise import _core

pytestmark = pytest.mark.timeout(60)

MODEL = Setup(chunks=(ChunkSpec(((700, True), (65, True))), ChunkSpec(((130, True), (3, False))), ChunkSpec(((900, True),))))
FAILURES = (_core.DeviceError, _core.EngineStoppedError)


def streamed(**changes: Any) -> Setup:
    """The model with every chunk streamed and stepped on the host."""
    return with_placement(MODEL, "streamed", **changes)


def on_device(**changes: Any) -> Setup:
    """The model with everything on the device."""
    return with_placement(MODEL, "device", **changes)


# ---- failing devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "queue", "accumulation"),
    [
        ("streamed", "h2d", 1),
        ("streamed", "d2h", 1),
        ("streamed", "d2h", 2),
        ("resident", "h2d", 1),
        ("resident", "d2h", 1),
        ("device", "optimizer", 1),
        ("device", "optimizer", 2),
        ("visiting", "states_in", 1),
        ("visiting", "states_out", 2),
        ("visiting", "optimizer", 1),
    ],
)
@pytest.mark.parametrize("clip_mode", ["defer", "speculate"])
@pytest.mark.parametrize("moment", ["before forward", "before backward", "before commit", "after commit"])
def test_a_failing_command_stops_the_step(placement: str, queue: str, accumulation: int, clip_mode: str, moment: str) -> None:
    """A failure of any queue at any moment reaches the caller with its message within two steps; afterwards every call raises it."""
    rig = Rig(with_placement(MODEL, placement, accumulation=accumulation, clip_mode=clip_mode, latency_ns=100_000))
    rig.step(1)

    def fail() -> None:
        rig.device.fail_next(queue, "cable pulled")

    def two_steps() -> None:
        for number in range(2):
            if number == 0 and moment == "before forward":
                fail()
            for micro in range(accumulation):
                rig.forward()
                if number == 0 and moment == "before backward" and micro == 0:
                    fail()
                rig.backward(rig.random_grads(micro))
            if number == 0 and moment == "before commit":
                fail()
            rig.commit()
            if number == 0 and moment == "after commit":
                fail()
        rig.engine.flush()

    # What is visible after the failure is not checked: only that it is reported.
    rig.check_visible = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(FAILURES, match="cable pulled"):
        two_steps()
    for call in (
        lambda: rig.engine.enter(0, False, STREAM),
        lambda: rig.engine.commit(STREAM),
        lambda: rig.engine.flush(),
        lambda: rig.engine.decision(True),
        lambda: rig.engine.drop_grads(),
    ):
        with pytest.raises(FAILURES, match="cable pulled"):
            call()


def test_only_the_emulated_device_fails_on_demand() -> None:
    """An unknown queue is named in the error."""
    with pytest.raises(ValueError, match=r'"optimizer", "states_in" or "states_out", not "compute"'):
        _core.Device.emulated().fail_next("compute", "x")


# ---- budgets ---------------------------------------------------------------------------------------------------------------


def test_bind_beyond_the_budget_takes_nothing() -> None:
    """BudgetError has the numbers, and the budget is as it was."""
    layout = MODEL.layout()
    budget = layout.param_bytes(0) + 100
    setup = on_device(device_budget=budget)
    engine = _core.Engine(layout, setup.trace(), setup.plan(), _core.Device.emulated(), device_budget=budget, host_budget=setup.host_budget)
    params = np.zeros(layout.numel(0), np.float32)
    states = np.zeros(layout.state_bytes(0), np.uint8)
    engine.bind(0, param=address(params))
    used = layout.param_bytes(0)
    with pytest.raises(_core.BudgetError) as caught:
        engine.bind(0, states=address(states))
    error = caught.value
    needed = used + layout.state_bytes(0)
    assert (error.tier, error.needed_bytes, error.budget_bytes, error.shortfall_bytes) == ("device", needed, budget, needed - budget)
    assert str(layout.state_bytes(0)) in str(error)
    assert "`chunk0`" in str(error)
    assert engine.stats()["device_bytes"] == used
    with pytest.raises(_core.BudgetError, match="activations needs 101 bytes"):
        engine.account("activations", 101)
    engine.account("activations", 100)
    assert engine.stats()["device_bytes"] == budget == engine.stats()["device_peak_bytes"]
    with pytest.raises(ValueError, match="101 bytes given back, 100 were taken"):
        engine.account("activations", -101)
    engine.account("activations", -100)
    assert engine.stats()["device_bytes"] == used
    with pytest.raises(ValueError, match="no device memory was bound for states of `chunk0`"):
        engine.start()


def test_slab_beyond_the_budget() -> None:
    """The streaming slab counts too."""
    setup = streamed(device_budget=MODEL.slab_bytes() - 1)
    with pytest.raises(_core.BudgetError, match="the streaming slab needs"):
        Rig(setup)


def test_host_budget_is_checked_at_construction() -> None:
    """A host slab that does not fit is refused before it is mapped, with what is missing."""
    rig = Rig(streamed())
    needed = rig.engine.stats()["host_bytes"]
    assert Rig(streamed(host_budget=needed)).engine.stats()["host_bytes"] == needed
    with pytest.raises(_core.BudgetError) as caught:
        Rig(streamed(host_budget=needed - 1))
    assert (caught.value.tier, caught.value.needed_bytes, caught.value.shortfall_bytes) == ("host", needed, 1)


def test_a_unit_larger_than_the_slab_names_chunk_and_users() -> None:
    """No slot: the error names the chunk, the bytes and who occupies them; the engine goes on afterwards."""
    rig = Rig(streamed())
    slots = rig.enter(2)
    with pytest.raises(_core.ScheduleError) as caught:
        rig.engine.enter(0, False, STREAM)
    message = str(caught.value)
    assert "`chunk0`" in message
    assert "`chunk2`" in message
    assert f"of the slab's {rig.setup.slab_bytes()} bytes" in message
    rig.leave(2, slots)
    rig.step(3)
    rig.finish()


def test_moving_a_chunk_to_a_full_host_changes_nothing() -> None:
    """A class change that the host slab has no room for is refused, and the chunk stays as it was."""
    setup = replace(MODEL, chunks=tuple(ChunkSpec(((numel, True),), "device", "resident") for numel in (1500, 64)))
    layout = setup.layout()
    device = _core.Device.emulated()
    pages = 8 * 4096  # Four payloads of two pages each: just enough for the large chunk, twice what the small one takes.
    engine = _core.Engine(layout, setup.trace(), setup.plan(), device, device_budget=1 << 22, host_budget=1 << 22, host_spare_bytes=pages)
    engine.set_class(1, "host")
    for _ in range(3):
        with pytest.raises(ValueError, match="no region of 8192 bytes left"):
            engine.set_class(0, "host")
        assert engine.host_offset(0, "param") is None
        assert json.loads(engine.residency())[0]["param"] == {"at": "device"}
    engine.set_class(1, "device")
    engine.set_class(0, "host")
    assert engine.host_offset(0, "grad") is not None


# ---- wrong calls -----------------------------------------------------------------------------------------------------------


def test_backward_more_often_than_the_plan_accumulates() -> None:
    """The error names the setting that allows it."""
    rig = Rig(streamed(accumulation=2))
    for micro in range(2):
        rig.backward(rig.random_grads(micro))
    with pytest.raises(_core.ScheduleError, match="gradient_accumulation_steps=3"):
        rig.engine.backward_begin()
    rig.commit()
    rig.finish()


def test_commit_in_the_middle_of_accumulation() -> None:
    """A step after one of two micro-batches is refused instead of waiting for ever for the rest."""
    rig = Rig(streamed(accumulation=2))
    rig.backward(rig.random_grads(1))
    with pytest.raises(_core.ScheduleError, match=r"after 1 of the 2 backward passes.*gradient_accumulation_steps=1"):
        rig.engine.commit(STREAM)
    rig.backward(rig.random_grads(2))
    rig.commit()
    rig.finish()


@pytest.mark.parametrize("setup", [streamed(), on_device(), streamed(accumulation=2)])
def test_gradients_twice(setup: Setup) -> None:
    """Gradients of a chunk come once per backward; the second ones change nothing."""
    rig = Rig(setup)
    grads = rig.random_grads(1)
    rig.engine.backward_begin()
    rig.lend(0, grads[0])
    with pytest.raises(_core.ScheduleError, match=r"`chunk0`.*twice"):
        rig.engine.grads(0, [(0, address(grads[0][0]))], STREAM)
    rig.engine.backward_end(STREAM)
    rig.micro_step = 1
    while rig.micro_step < setup.accumulation:
        rig.backward(rig.random_grads(2))
    rig.commit()
    rig.finish()


def test_wrong_arguments_are_named() -> None:
    """Unknown ids, payloads and lengths are refused with their values, and nothing happened."""
    rig = Rig(with_placement(MODEL, "streamed"))
    engine = rig.engine
    grad = np.zeros(700, np.float32)
    wrong: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (_core.ScheduleError, "unit 7 is not in the trace of 3 units", lambda: engine.enter(7, False, STREAM)),
        (_core.ScheduleError, "unit 7 is not in the trace", lambda: engine.leave(7, False, STREAM)),
        (_core.ScheduleError, "left `unit1` without entering it", lambda: engine.leave(1, False, STREAM)),
        (_core.ScheduleError, "left `unit1` without entering it", lambda: engine.leave(1, True, STREAM)),
        (ValueError, "chunk 9 does not exist", lambda: engine.host_offset(9, "param")),
        (ValueError, "chunk 9 does not exist", lambda: engine.touch(9, STREAM)),
        (ValueError, "chunk 9 does not exist", lambda: engine.generation(9)),
        (ValueError, "chunk 9 does not exist", lambda: engine.bind(9, param=1)),
        (ValueError, "chunk 9 does not exist", lambda: engine.grads(9, [], STREAM)),
        (ValueError, "chunk 9 does not exist", lambda: engine.set_class(9, "host")),
        (ValueError, "unknown payload `weight`; known are param", lambda: engine.host_offset(0, "weight")),
        (ValueError, 'not "nvme"', lambda: engine.set_class(0, "nvme")),
        (
            _core.ScheduleError,
            "only to one that is stepped on the device where its parameters are streamed",
            lambda: engine.set_class(0, "host"),
        ),
        (ValueError, "bind device memory for the parameters of `chunk0`", lambda: engine.set_class(0, "device")),
        (ValueError, "no trainable parameter 5 in `chunk0`", lambda: engine.grads(0, [(5, address(grad))], STREAM)),
        (ValueError, "no trainable parameter 1 in `chunk1`", lambda: engine.grads(1, [(1, address(grad))], STREAM)),
        (ValueError, "2 group indices for 5 parameters", lambda: engine.set_hyper([ADAMW], [0, 0])),
        (ValueError, "group 1 of 1", lambda: engine.set_hyper([ADAMW], [0, 0, 0, 0, 1])),
        (ValueError, "4 step counts for 5 parameters", lambda: engine.set_param_steps([1, 2, 3, 4])),
    ]
    for kind, message, call in wrong:
        with pytest.raises(kind, match=message):
            call()
    rig.step(1)
    rig.finish()


def test_a_plan_of_another_model_is_refused() -> None:
    """Lengths of plan, layout and trace have to agree."""
    setup = streamed()
    other = replace(setup, chunks=setup.chunks[:2])
    with pytest.raises(ValueError, match="the plan is for 2 chunks and 2 units, the model has 3 and 3"):
        _core.Engine(setup.layout(), setup.trace(), other.plan(), _core.Device.emulated(), device_budget=1, host_budget=1)


def test_nothing_moves_before_start() -> None:
    """Before `start`, calls that would touch unbound memory are refused; `drop_grads` has nothing to drop."""
    rig = Rig(streamed(), started=False)
    engine = rig.engine
    for call in (
        lambda: engine.enter(0, False, STREAM),
        lambda: engine.leave(0, False, STREAM),
        lambda: engine.touch(0, STREAM),
        lambda: engine.backward_begin(),
        lambda: engine.grads(0, [], STREAM),
        lambda: engine.commit(STREAM),
    ):
        with pytest.raises(ValueError, match=r"start\(\) was not called"):
            call()
    engine.drop_grads()
    assert engine.stats()["fetches"] == 0
    engine.start()
    rig.set_hyper([ADAMW], [0] * 5)
    rig.step(1)
    rig.finish()


def test_a_step_without_hyperparameters_is_refused_whole() -> None:
    """A parameter with a gradient but without a group: nothing of the step is done, and setting one makes it possible."""
    rig = Rig(on_device())
    rig.set_hyper([ADAMW], [0, 0, 0, 0, -1])
    rig.backward(rig.random_grads(1))
    with pytest.raises(ValueError, match=r"`chunk2\.p0`; call set_hyper"):
        rig.engine.commit(STREAM)
    rig.set_hyper([ADAMW], [0] * 5)
    rig.commit()
    rig.finish()


# ---- gradients that are not finite -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["device", "resident", "streamed"])
@pytest.mark.parametrize("clip_mode", ["defer", "speculate"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_step_that_is_not_finite_changes_nothing(placement: str, clip_mode: str, value: float, precision: str) -> None:
    """Weights, moments, masters and step counts are exactly as before, also where chunks were stepped ahead of the decision."""
    rig = Rig(with_placement(MODEL, placement, clip_mode=clip_mode, precision=precision, max_norm=1e3))
    rig.step(1)
    rig.flush_and_compare()
    before = [{name: values.copy() for name, values in rig.reference.payloads(c).items()} for c in range(3)]
    steps = list(rig.reference.steps)
    speculated = rig.engine.stats()["speculated"]
    rig.forward()
    grads = rig.random_grads(2)
    # The first chunk's gradients come last: the others may have been speculated by then.
    bad = np.array([value], np.float32)
    grads[0][0][13] = (bad.view(np.uint32) >> 16).astype(np.uint16)[0] if precision == "bf16" else value
    rig.backward(grads)
    if clip_mode == "speculate" and placement != "device":
        deadline = time.monotonic() + 10
        while rig.engine.stats()["speculated"] < speculated + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert rig.engine.stats()["speculated"] == speculated + 2
    rig.commit()
    rig.flush_and_compare()
    decision = rig.engine.decision(True)
    assert decision is not None
    assert decision[3]
    assert rig.engine.stats()["skipped"] == 1
    for chunk, payloads in enumerate(before):
        for name, values in payloads.items():
            same(rig.reference.payloads(chunk)[name], values, name)
    assert rig.engine.param_steps() == steps
    rig.step(3)
    rig.finish()


# ---- forked children -------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked child: 0 if the work returned, 1 if it raised, 2 if it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


def refused_in_child(engine: _core.Engine) -> None:
    """Every call raises and names both processes; the memory is not mapped."""
    for call in (
        lambda: engine.enter(0, False, STREAM),
        lambda: engine.commit(STREAM),
        lambda: engine.flush(),
        lambda: engine.stats(),
        lambda: engine.host_offset(0, "param"),
        lambda: engine.drop_grads(),
    ):
        with pytest.raises(_core.TierwiseError, match=rf"process {os.getppid()}.*child {os.getpid()}"):
            call()
    with pytest.raises(BufferError, match=f"process {os.getppid()}; its forked child {os.getpid()}"):
        memoryview(engine.host_buffer)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_cannot_use_the_engine_or_harm_it() -> None:
    """Every call in the child raises and names both processes; dropping everything there leaves the parent's step as it was."""
    held = [Rig(streamed(clip_mode="speculate", latency_ns=2_000_000))]
    rig = held[0]
    rig.step(1)
    rig.forward()

    def child() -> None:
        refused_in_child(held[0].engine)
        nonlocal rig
        del rig
        held.clear()
        gc.collect()

    assert in_child(child) == 0
    rig.backward(rig.random_grads(5))
    rig.commit()
    rig.step(6)
    rig.finish()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_buffer_that_outlives_its_engine_may_be_dropped_in_a_child() -> None:
    """The last reference to the host memory may go in a child: nothing hangs there, and the parent keeps the bytes."""
    rig = Rig(streamed())
    rig.step(1)
    rig.flush_and_compare()
    views = [rig.host]
    expected = rig.host.copy()
    del rig
    gc.collect()

    def child() -> None:
        views.clear()
        gc.collect()

    assert in_child(child) == 0
    np.testing.assert_array_equal(views[0], expected)


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------------


def interrupted_after(seconds: float, call: Callable[[], object]) -> None:
    """The call raises KeyboardInterrupt, soon after the signal."""
    # A background job of a shell starts with SIGINT ignored; then Python has no handler that could raise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
        waited = time.monotonic() - start
    except BaseException:
        timer.cancel()
        raise
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert seconds <= waited < seconds + 0.7


BLOCKED: dict[str, Callable[[Rig], object]] = {
    "enter": lambda rig: rig.engine.enter(0, False, STREAM),
    "touch": lambda rig: rig.engine.touch(0, STREAM),
    "decision": lambda rig: rig.engine.decision(True),
    "commit": lambda rig: rig.engine.commit(STREAM),
    "backward_begin": lambda rig: rig.engine.backward_begin(),
    "flush": lambda rig: rig.engine.flush(),
}


@pytest.mark.parametrize("call", BLOCKED)
def test_ctrl_c_ends_a_wait_for_an_undecided_step(call: str) -> None:
    """While gradients crawl to the host, every call that waits for them heeds Ctrl-C, and can be repeated."""
    rig = Rig(streamed(d2h_bytes_per_second=6_000.0))
    rig.forward()
    rig.backward(rig.random_grads(1))
    rig.commit()
    interrupted_after(0.1, lambda: BLOCKED[call](rig))
    rig.forward()
    rig.finish()


def test_ctrl_c_ends_a_wait_for_room_or_for_a_drop() -> None:
    """Gradients that wait for others on their way, and a `zero_grad` that waits for them, heed Ctrl-C too."""
    rig = Rig(streamed(d2h_bytes_per_second=6_000.0, grad_in_flight_bytes=1))
    grads = rig.random_grads(1)
    rig.engine.backward_begin()
    rig.lend(2, grads[2])
    interrupted_after(0.05, lambda: rig.engine.grads(1, [(0, address(grads[1][0]))], STREAM))
    interrupted_after(0.05, rig.engine.drop_grads)
    rig.engine.backward_end(STREAM)
    rig.micro_step = 1
    rig.commit()
    rig.finish()


# ---- ends ------------------------------------------------------------------------------------------------------------------


def test_host_views_outlive_the_engine() -> None:
    """Views keep the memory: what a flush showed is still there after the engine is gone."""
    rig = Rig(streamed(precision="bf16"))
    rig.step(1)
    rig.flush_and_compare()
    views = {(c, p): rig.host_view(c, p) for c in range(3) for p in ("param", "master", "exp_avg", "exp_avg_sq")}
    reference = rig.reference
    del rig
    gc.collect()
    for (chunk, payload), view in views.items():
        assert view is not None
        same(view, reference.payloads(chunk)[payload], f"{payload} of chunk {chunk}")


DELETE = """
import gc, sys, time
import numpy as np
from tests.support.engine_model import ChunkSpec, Rig, Setup, with_placement
placement, mode, pause, kept = sys.argv[1], sys.argv[2], float(sys.argv[3]), []
for number in range(4):
    chunks = (ChunkSpec(((2_000_000, True),)), ChunkSpec(((1_000_000, True),)))
    setup = with_placement(Setup(chunks=chunks), placement, clip_mode=mode, undo_bytes=1 << 27, grad_in_flight_bytes=1 << 27,
                           device_budget=1 << 30, host_budget=1 << 30, latency_ns=3_000_000 * (number % 2))
    rig = Rig(setup)
    rig.check_visible = lambda *_: None
    kept.append(rig.device)
    rig.engine.backward_begin()
    for chunk in (1, 0):
        grad = np.ones(rig.layout.state_numel(chunk), np.float32)
        kept.append(grad)
        rig.engine.grads(chunk, [(0, grad.ctypes.data)], 0)
    rig.engine.backward_end(0)
    rig.engine.commit(0)
    time.sleep(pause * number)
    del rig
    gc.collect()
print("alive")
"""


@pytest.mark.parametrize(("placement", "mode"), [("resident", "defer"), ("streamed", "speculate"), ("device", "defer")])
@pytest.mark.parametrize("pause", [0.0, 0.003])
def test_deleting_the_engine_in_the_middle_of_a_step(placement: str, mode: str, pause: float) -> None:
    """Copies and steps in flight end before their memory goes, even if the device lives on."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", DELETE, placement, mode, str(pause)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


@pytest.mark.parametrize("call", ["enter", "touch", "flush"])
def test_ctrl_c_ends_a_wait_for_a_slow_copy(call: str) -> None:
    """While parameters crawl to the device, whoever waits for the copy itself heeds Ctrl-C, and can be repeated."""
    rig = Rig(streamed(h2d_bytes_per_second=2_000.0))
    if call == "flush":
        interrupted_after(0.1, lambda: rig.engine.enter(0, False, STREAM))
    interrupted_after(0.1, lambda: BLOCKED[call](rig))
    rig.forward()
    rig.finish()
