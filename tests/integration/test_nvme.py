"""The NVMe tier on a real directory: the same bits as in memory, the bytes that the design promises, and errors where a disk fails."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tierwise import BudgetError, StorageError, StorageStoppedError, TierwiseError, _core
from tierwise.observe import StepMeter

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.timeout(120)

STATIC = {"placement_policy": "static", "offload_optim_frac": 1.0}
STREAMED = {**STATIC, "offload_param_frac": 1.0}
PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk: where pytest's is in memory, one beside the tests."""
    try:
        _core.probe_disk(tmp_path, 2**20, 0.01)
    except ValueError as error:
        if "keeps files in memory" in str(error):
            with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as directory:
                yield Path(directory)
            return
    yield tmp_path


def tightest_host(kit: Any, disk: Path, **options: Any) -> int:
    """The smallest host budget with which everything that can be spilled is, gradients too where that saves more than buffers take."""
    with pytest.raises(BudgetError) as caught:
        kit.boosted(kit.llama(), **options, host_budget=1000, nvme_path=disk)
    assert caught.value.tier == "host"
    return caught.value.needed_bytes


def least_host(kit: Any, disk: Path, **options: Any) -> int:
    """The smallest host budget with which everything but gradients is spilled."""
    tightest = tightest_host(kit, disk, **options)
    plan = kit.boosted(kit.llama(), **options, host_budget=tightest, nvme_path=disk)[0]._runtime.memory.plan
    if plan["nvme"]["grad_buffers"] == 0:
        return tightest
    assert {c["accumulate"] for c in plan["chunks"]} == {"nvme"}
    gradients: int = kit.boosted(kit.llama(), **options)[0]._runtime.memory.plan["host"]["gradients"]
    # Gradients that stay need no room to land on their way, nor do sums that are taken on the device.
    return tightest + gradients - plan["host"]["staging"] - plan["nvme"]["grad_buffers"] * plan["nvme"]["grad_buffer_bytes"]


def placed(result: Any) -> list[dict[str, str]]:
    chunks: list[dict[str, str]] = result.booster._runtime.memory.plan["chunks"]
    return chunks


def params_host_bytes(result: Any) -> int:
    layout = result.booster._runtime.layout
    return sum(-(-layout.param_bytes(c) // PAGE) * PAGE for c in range(layout.num_chunks))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("max_norm", [None, 0.4])
def test_what_lives_on_the_disk_changes_no_bit(kit: Any, disk: Path, precision: str, accumulation: int, max_norm: float | None) -> None:
    options: dict[str, Any] = {"precision": precision, "gradient_accumulation_steps": accumulation, "max_norm": max_norm}
    reference = kit.train(kit.llama(), **options)
    everything = least_host(kit, disk, **options, **STATIC)
    states = everything + params_host_bytes(reference)
    # fp32 has no low halves: leaving the parameters in memory is what differs.
    tight = least_host(kit, disk, **options, **STREAMED)
    few_slots = {**STREAMED, "device_budget": kit.tightest(kit.llama, **options, **STREAMED)}
    fetching = kit.boosted(kit.llama(), **options, **STREAMED, host_budget=tight, nvme_path=disk)[0]._runtime.memory.plan["nvme"]
    # What streams from memory needs its parameters there, and no buffers to fetch through.
    streaming = tight + params_host_bytes(reference) - fetching["fetch_buffers"] * fetching["fetch_buffer_bytes"]
    variants: dict[str, tuple[dict[str, Any], set[tuple[str, str]]]] = {
        "moments and low halves": ({**STATIC, "host_budget": states}, {("nvme", "resident")}),
        "parameters too": ({**STATIC, "host_budget": everything}, {("nvme", "spilled")}),
        "some of both": ({**STATIC, "host_budget": (everything + states) // 2}, {("nvme", "resident"), ("nvme", "spilled")}),
        "streamed": ({**STREAMED, "host_budget": streaming}, {("nvme", "streamed")}),
        "parameters fetched": ({**STREAMED, "host_budget": tight}, {("nvme", "fetched")}),
        "some fetched": (
            {**STREAMED, "host_budget": (tight + streaming) // 2},
            {("nvme", "streamed"), ("nvme", "fetched")},
        ),
        "fetched into as few slots as can be": (
            {**few_slots, "host_budget": least_host(kit, disk, **options, **few_slots)},
            {("nvme", "fetched")},
        ),
        "gradients too": ({**STATIC, "host_budget": tightest_host(kit, disk, **options, **STATIC)}, {("nvme", "spilled")}),
        "gradients and fetched parameters": (
            {**STREAMED, "host_budget": tightest_host(kit, disk, **options, **STREAMED)},
            {("nvme", "fetched")},
        ),
        "some in memory": ({**STATIC, "host_budget": states * 7 // 5}, {("nvme", "resident"), ("host", "resident")}),
        "two threads": ({**STATIC, "host_budget": everything, "num_threads": 2}, {("nvme", "spilled")}),
        "speculating": ({**STATIC, "host_budget": states * 3 // 2, "clip_mode": "speculate"}, {("nvme", "resident"), ("host", "resident")}),
        "recomputed": (
            {**STREAMED, "host_budget": least_host(kit, disk, **options, **STREAMED), "recompute": "full"},
            {("nvme", "fetched")},
        ),
    }
    if accumulation > 1:
        for name in ("some of both", "two threads", "recomputed", "some fetched"):
            del variants[name]
    for name, (variant, expected) in variants.items():
        result = kit.train(kit.llama(), **{**options, **variant}, nvme_path=disk)
        stats = result.booster.stats()
        result.same_as(reference)
        assert {(c["class"], c["home"]) for c in placed(result)} == expected, name
        assert stats["host_peak_bytes"] <= stats["host_budget_bytes"], name
        assert stats["nvme_bytes"] <= stats["nvme_file_bytes"] <= stats["nvme_budget_bytes"], name
        assert stats["nvme_written_bytes"] > 20 * stats["nvme_payload_bytes"] * 0.9, name
        assert stats["nvme_retries"] == 0, name
        assert (stats["nvme_fetched_bytes"] > 0) == (("nvme", "fetched") in expected), name
        on_disk = {c["accumulate"] == "nvme" for c in placed(result)}
        # Between sums on the device and sums on the disk the planner takes the faster ones.
        assert on_disk == {name.startswith("gradients")} or (accumulation > 1 and not name.startswith("gradients")), name
        assert (stats["nvme_grad_bytes"] > 0) == (True in on_disk), name
    assert list(disk.iterdir()) == []


def test_host_memory_that_no_chunk_fills_becomes_staging_buffers(kit: Any, disk: Path) -> None:
    def plan(**options: Any) -> dict[str, Any]:
        # The parameters of every chunk are more than two buffers.
        booster, *_ = kit.boosted(kit.llama(hidden_size=256, vocab_size=512), **STATIC, nvme_path=disk, **options)
        found: dict[str, Any] = booster._runtime.memory.plan
        return found

    with pytest.raises(BudgetError) as caught:
        plan(host_budget=1000)
    least = caught.value.needed_bytes
    tight = plan(host_budget=least)
    buffers, size = tight["nvme"]["buffers"], tight["nvme"]["buffer_bytes"]
    roomy = plan(host_budget=least + 2 * size)
    assert roomy["chunks"] == tight["chunks"]
    assert roomy["nvme"]["buffers"] == buffers + 2
    assert roomy["host"]["nvme_staging"] == tight["host"]["nvme_staging"] + 2 * size
    # Undo records use that room too, and a disk without room to rewrite more at once cannot.
    assert plan(host_budget=least + 2 * size, clip_mode="speculate")["nvme"]["buffers"] == buffers
    assert plan(host_budget=least + 2 * size, nvme_budget=tight["nvme"]["file_bytes"])["nvme"]["buffers"] == buffers


def test_without_a_path_nothing_is_spilled(kit: Any, disk: Path) -> None:
    plain = kit.train(kit.llama(), steps=3, **STATIC)
    assert plain.booster._runtime.memory.plan["nvme"] is None
    assert not [name for name in plain.booster.stats() if name.startswith("nvme")]
    # With room in memory the disk is not used either.
    idle = kit.train(kit.llama(), steps=3, **STATIC, nvme_path=disk)
    assert idle.booster._runtime.memory.plan["nvme"] is None
    idle.same_as(plain)


@pytest.mark.parametrize(("spilled", "bytes_per_parameter"), [("states", 20), ("parameters", 24), ("gradients", 28)])
def test_bytes_per_spilled_parameter_and_step(kit: Any, disk: Path, spilled: str, bytes_per_parameter: int) -> None:
    options: dict[str, Any] = {"precision": "bf16", **STATIC}
    reference = kit.train(kit.llama(), steps=1, **options)
    budget = tightest_host(kit, disk, **options) if spilled == "gradients" else least_host(kit, disk, **options)
    if spilled == "states":
        budget += params_host_bytes(reference)
    booster, model, optimizer = kit.boosted(kit.llama(), **options, host_budget=budget, nvme_path=disk)
    nvme = booster._runtime.memory.plan["nvme"]
    layout = booster._runtime.layout
    numels = [layout.state_numel(c) for c in range(layout.num_chunks)]
    element = bytes_per_parameter // 2
    assert nvme["read_bytes"] == nvme["written_bytes"] == sum(numels) * element
    pieces = [min(nvme["piece_numel"], numel - first) for numel in numels for first in range(0, numel, nvme["piece_numel"])]
    assert len(pieces) > 3 * nvme["buffers"]
    extents = [12, 2] if spilled == "gradients" else [element]
    on_disk = sum(-(-piece * size // PAGE) * PAGE for piece in pieces for size in extents)
    before = None
    for step, ids in enumerate(kit.batches(6)):
        booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
        optimizer.step()
        booster.flush()
        stats = booster.stats()
        if before is not None and step > 2:
            assert stats["nvme_written_bytes"] - before["nvme_written_bytes"] == on_disk
            # What is read ahead for the next step may still be on its way.
            read = stats["nvme_read_bytes"] - before["nvme_read_bytes"]
            assert abs(read - on_disk) <= 2 * nvme["buffers"] * nvme["buffer_bytes"]
        before = stats
    assert on_disk / sum(numels) / element < 1.1, "padding is small even for this tiny model"


@pytest.mark.parametrize("clip_mode", ["defer", "speculate", "auto"])
def test_clipping_skipped_steps_and_dropped_gradients(kit: Any, disk: Path, clip_mode: str) -> None:
    def run(**options: Any) -> tuple[Any, list[Any]]:
        booster, model, optimizer = kit.boosted(kit.llama(), precision="bf16", max_norm=0.6, clip_mode=clip_mode, **STATIC, **options)
        seen = []
        for step, ids in enumerate(kit.batches(10)):
            loss = model(input_ids=ids, labels=ids).loss
            if step == 3:
                loss = loss * float("inf")
            booster.backward(loss, optimizer)
            if step == 5:
                optimizer.zero_grad()
                continue
            optimizer.step()
            optimizer.zero_grad()
            seen.append((loss.item(), optimizer.grad_norm, optimizer.last_step_skipped))
        booster.flush()
        return booster, [seen, optimizer.state_dict(), dict(model.state_dict())]

    _, reference = run()
    for least in (least_host, tightest_host):
        budget = least(kit, disk, precision="bf16", max_norm=0.6, **STATIC)
        booster, spilled = run(host_budget=budget, nvme_path=disk)
        assert {c["accumulate"] for c in booster._runtime.memory.plan["chunks"]} == {"host" if least is least_host else "nvme"}
        assert booster.stats()["skipped"] == 1
        assert booster.stats()["clipped"] > 0
        torch.testing.assert_close(spilled, reference, rtol=0, atol=0, equal_nan=True)


def test_parameters_without_gradients_keep_their_states_and_steps(kit: Any, disk: Path) -> None:
    def branches() -> Any:
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({name: torch.nn.Linear(96, 96) for name in ("left", "right")})
        model.forward = lambda x, right: model["right"](model["left"](x)) if right else model["left"](x)
        return model

    def loss_of(model: Any, step: int) -> Any:
        generator = torch.Generator().manual_seed(step)
        return (model(torch.randn(4, 96, generator=generator), step % 3 == 0) ** 2).mean()

    reference = kit.fit(branches(), loss_of, steps=8, host_budget="64MiB", **STATIC)
    spilled = kit.fit(branches(), loss_of, steps=8, host_budget="300KiB", nvme_path=disk, **STATIC)
    assert "nvme" in {c["class"] for c in placed(spilled)}
    spilled.same_as(reference)
    reference.booster.flush()
    spilled.booster.flush()
    assert spilled.optimizer.param_steps().values() != {8}
    states, expected = spilled.optimizer.state_dict(), reference.optimizer.state_dict()
    torch.testing.assert_close(states, expected, rtol=0, atol=0)
    assert {int(entry["step"]) for entry in states["state"].values()} == {3, 8}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("placement", [STATIC, STREAMED], ids=["resident", "fetched"])
def test_checkpoints_resume_exactly_between_memory_and_disk(
    kit: Any, disk: Path, tmp_path: Path, precision: str, placement: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"precision": precision, "max_norm": 0.5, "initial_scale": 2.0**10, **placement}
    spilling = {"host_budget": tightest_host(kit, disk, **options), "nvme_path": disk}
    batches, steps = kit.batches(10), kit.steps
    booster, model, optimizer = kit.boosted(kit.llama(), **options)
    expected = steps(booster, model, optimizer, batches)
    for number, (first, second) in enumerate([(spilling, spilling), (spilling, {}), ({}, spilling)]):
        folder = tmp_path / str(number)
        booster, model, optimizer = kit.boosted(kit.llama(), **options, **first)
        assert {c["accumulate"] == "nvme" for c in booster.plan()["chunks"]} == {"nvme_path" in first}
        assert steps(booster, model, optimizer, batches[:5]) == expected[:5]
        booster.save_model(model, folder / "model")
        booster.save_optimizer(optimizer, folder / "optimizer")
        state = optimizer.state_dict()
        # Saving disturbs nothing.
        assert steps(booster, model, optimizer, batches[5:]) == expected[5:]
        booster, model, optimizer = kit.boosted(kit.llama(seed=7), **options, **second)
        booster.load_model(model, folder / "model")
        booster.load_optimizer(optimizer, folder / "optimizer")
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
        assert steps(booster, model, optimizer, batches[5:]) == expected[5:]
        optimizer.load_state_dict(state)
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
        stats = booster.stats()
        assert stats["host_peak_bytes"] <= stats["host_budget_bytes"]


def test_a_budget_error_names_the_disk_and_what_fits(kit: Any, disk: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"more host memory.*nvme_path=.* makes it fit, with [0-9.]+ MiB of disk \(limit it with nvme_budget\)"
    ):
        kit.boosted(kit.llama(), **STATIC, host_budget="1MiB")
    options = {**STATIC, "host_budget": least_host(kit, disk, **STATIC), "nvme_path": disk}
    with pytest.raises(BudgetError, match=r"more nvme memory: .*these fit: nvme_budget='(\d+)MiB'") as caught:
        kit.boosted(kit.llama(), **options, nvme_budget="1MiB")
    assert caught.value.tier == "nvme"
    fitting = re.search(r"nvme_budget='(\d+MiB)'", str(caught.value))
    assert fitting is not None
    result = kit.train(kit.llama(), steps=2, **options, nvme_budget=fitting[1])
    assert result.booster.stats()["nvme_file_bytes"] <= result.booster.stats()["nvme_budget_bytes"]


def test_options_that_cannot_work_are_refused(kit: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a directory; name one on an NVMe disk"):
        kit.plugin(nvme_path=tmp_path / "missing")
    with pytest.raises(ValueError, match="nvme_budget=1048576 needs nvme_path"):
        kit.plugin(nvme_budget="1MiB")
    with pytest.raises(ValueError, match=r"nvme_read_bytes_per_second=1000000000.0 needs nvme_path"):
        kit.plugin(nvme_read_bytes_per_second=1e9)
    with pytest.raises(ValueError, match="nvme_write_bytes_per_second must be a positive finite number or None, got 0"):
        kit.plugin(nvme_path=tmp_path, nvme_write_bytes_per_second=0)
    if os.path.isdir("/dev/shm"):
        options = {**STATIC, "nvme_path": "/dev/shm"}
        with pytest.raises(ValueError, match="keeps files in memory: spilling there saves nothing"):
            kit.boosted(kit.llama(), **options, host_budget=least_host(kit, Path("/dev/shm"), **STATIC))


def test_the_planner_counts_on_the_speeds_that_the_disk_has(kit: Any, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {**STATIC, "host_budget": least_host(kit, disk, **STATIC), "nvme_path": disk}
    measured = {"nvme_read_bytes_per_second": None, "nvme_write_bytes_per_second": None}

    def speeds(**given: Any) -> tuple[float, float, str]:
        booster, *_ = kit.boosted(kit.llama(), **options, **given)
        wanted = booster._runtime.planned.wanted["nvme"]
        (line,) = [line for line in booster.explain().splitlines() if line.startswith("disk: ")]
        assert f"reads {wanted['read_bytes'] / 1e9:.2f} GB/s, writes {wanted['write_bytes'] / 1e9:.2f} GB/s, each alone" in line
        return wanted["read_bytes"], wanted["write_bytes"], line

    calls = []
    probe = _core.probe_disk

    def counted(directory: str, max_bytes: int, max_seconds: float) -> str:
        calls.append((directory, max_bytes, max_seconds))
        # As the machine would, but with little.
        return probe(directory, 2**25, max_seconds / 10)

    monkeypatch.setattr(_core, "probe_disk", counted)
    assert speeds()[:2] == (2.5e9, 2e9), "what the user says wins"
    assert calls == []
    read, write, line = speeds(**measured)
    assert line.endswith("(measured)")
    assert (read, write) != (2.5e9, 2e9)
    assert min(read, write) > 1e5
    assert [directory for directory, *_ in calls] == [str(disk.resolve())]
    assert calls[0][2] < 1
    assert speeds(**measured)[:2] == (read, write), "once per process"
    assert len(calls) == 1
    found = speeds(nvme_read_bytes_per_second=None, nvme_write_bytes_per_second=1e6)
    assert found[:2] == (read, 1e6)
    assert found[2].endswith("(write given, the other measured)")


def test_a_disk_that_cannot_be_measured_counts_as_a_common_one(kit: Any, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(directory: str, max_bytes: int, max_seconds: float) -> str:
        raise StorageError("nearly full")

    monkeypatch.setattr(_core, "probe_disk", refuse)
    unknown = {"nvme_read_bytes_per_second": None, "nvme_write_bytes_per_second": None}
    booster, *_ = kit.boosted(kit.llama(), **STATIC, nvme_path=disk, **unknown)
    assert "(a common disk's, because this one could not be measured: nearly full)" in booster.explain()
    if os.path.isdir("/dev/shm"):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="keeps files in memory: spilling there saves nothing"):
            kit.boosted(kit.llama(), **STATIC, nvme_path="/dev/shm", **unknown)


def test_the_plan_the_metrics_and_the_timeline_show_the_disk(kit: Any, disk: Path, tmp_path: Path) -> None:
    booster, model, optimizer = kit.boosted(kit.llama(), **STATIC, host_budget=least_host(kit, disk, **STATIC), nvme_path=disk)
    text = booster.explain()
    assert "stepped by the CPU with their states on the disk, parameters resident, with their copy on the disk" in text
    assert re.search(rf"nvme: [0-9.]+ MiB of [0-9.]+ GiB in {disk} \(.* of states and room to rewrite them\); every step reads ", text)
    meter = StepMeter()
    booster.record_timeline()
    for step, ids in enumerate(kit.batches(3)):
        meter.start(booster.stats())
        booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
        optimizer.step()
        booster.flush()
        metrics = meter.measure(step=step, loss=0.0, grad_norm=None, tokens=1, stats=booster.stats())
    payload = booster.stats()["nvme_payload_bytes"]
    assert payload <= metrics.nvme_bytes
    assert payload <= metrics.nvme_written_bytes <= 1.1 * payload
    assert metrics.nvme_read_bytes > payload / 2
    assert metrics.nvme_wait_ms >= 0
    # Less time than the step took, and more than one transfer after the other would leave.
    assert 0 < metrics.nvme_busy_ms <= metrics.seconds * 1e3
    assert booster.stats()["nvme_transfer_ns"] >= booster.stats()["nvme_read_ns"]
    booster.timeline(tmp_path / "trace.json")
    trace = (tmp_path / "trace.json").read_text()
    for track in ('"nvme read"', '"nvme write"', '"nvme bytes"', '"write model.layers.0"'):
        assert track in trace


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_plan_with_gradients_on_the_disk_is_explained_and_recorded(kit: Any, disk: Path, tmp_path: Path, accumulation: int) -> None:
    options: dict[str, Any] = {**STATIC, "precision": "fp32", "gradient_accumulation_steps": accumulation}
    budget = tightest_host(kit, disk, **options)
    booster, model, optimizer = kit.boosted(kit.llama(), **options, host_budget=budget, nvme_path=disk)
    text = booster.explain()
    assert ("gradients on the disk: " if accumulation == 1 else "gradients added up on the disk: ") in text
    assert re.search(
        r"MiB of states and gradients and room to rewrite them\); every step reads .*, gradients through \d of [0-9.]+ KiB", text
    )
    booster.record_timeline()
    batches = iter(kit.batches(3 * accumulation))
    for _ in range(3):
        for _ in range(accumulation):
            ids = next(batches)
            booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
        optimizer.step()
    booster.flush()
    stats, nvme = booster.stats(), booster.plan()["nvme"]
    layout = booster._runtime.layout
    # Sums of fp32 are as large as gradients of fp32.
    gradients = 4 * sum(layout.state_numel(c) for c in range(layout.num_chunks))
    assert stats["nvme_grad_bytes"] == 3 * 2 * accumulation * gradients
    assert (nvme["grad_written_bytes"], nvme["grad_read_bytes"]) == (accumulation * gradients, (accumulation - 1) * gradients)
    booster.timeline(tmp_path / "trace.json")
    trace = (tmp_path / "trace.json").read_text()
    for span in ('"write gradient model.layers.0"', '"read gradient model.layers.0"'):
        assert span in trace


def test_accumulation_goes_on_after_a_checkpoint_in_its_middle(kit: Any, disk: Path) -> None:
    options: dict[str, Any] = {"precision": "bf16", "gradient_accumulation_steps": 2, "max_norm": 0.5, **STATIC}

    def run(looks: bool, **more: Any) -> tuple[list[float], Any, Any]:
        booster, model, optimizer = kit.boosted(kit.llama(), **options, **more)
        losses, seen = [], []
        for number, ids in enumerate(kit.batches(8)):
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.item())
            booster.backward(loss, optimizer)
            if looks and number == 4:
                seen = optimizer.state_dict()
            optimizer.step()
            optimizer.zero_grad()
        return losses, seen, optimizer.state_dict()

    losses, seen, states = run(True)
    spilled = run(True, host_budget=tightest_host(kit, disk, **options), nvme_path=disk)
    assert spilled[0] == losses
    torch.testing.assert_close(spilled[1:], (seen, states), rtol=0, atol=0)


# ---- disks that fail -------------------------------------------------------------------------------------------------------


def spill_files(disk: Path) -> list[str]:
    """The process's open files without a name in that directory, as paths that can be opened."""
    # Engines that nobody refers to any more may still wait for the collector, and hold theirs.
    gc.collect()
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target.startswith(str(disk.resolve())) and target.endswith("(deleted)"):
            found.append(f"/proc/self/fd/{number}")
    return found


@pytest.mark.filterwarnings("ignore:module forward hook with ``always_call=True`` raised:UserWarning")
@pytest.mark.parametrize("placement", [STATIC, STREAMED], ids=["resident", "fetched"])
@pytest.mark.parametrize("damage", ["overwritten", "truncated"])
def test_a_disk_that_returns_wrong_data_stops_the_step_with_its_name(kit: Any, disk: Path, damage: str, placement: dict[str, Any]) -> None:
    options = {**placement, "precision": "bf16"}
    booster, model, optimizer = kit.boosted(kit.llama(), **options, host_budget=least_host(kit, disk, **options), nvme_path=disk)
    batches = kit.batches(8)
    for ids in batches[:3]:
        booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
        optimizer.step()
    booster.flush()
    (path,) = spill_files(disk)
    size = os.stat(path).st_size
    if damage == "truncated":
        os.truncate(path, 0)
    else:
        with open(path, "r+b", buffering=0) as file:
            file.write(b"\x5a" * size)

    def go_on() -> None:
        for ids in batches[3:]:
            booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
            optimizer.step()
        booster.flush()

    with pytest.raises(TierwiseError) as caught:
        go_on()
    error = caught.value
    assert isinstance(error, StorageStoppedError)
    assert (error.errno, error.strerror, error.filename) == (errno.EIO, os.strerror(errno.EIO), str(disk))
    message = str(error)
    # What is fetched for a use is read without its states.
    assert re.search(r"spilled param(, master, exp_avg, exp_avg_sq)? of `[\w.]+`, elements \d+ to \d+: ", message), message
    assert re.search(r"generation \d+", message), message
    wanted = "has checksum 0x.* continue from the last checkpoint"
    if damage == "truncated":
        # A write behind the cut makes the file long again, with zeros where the data was.
        wanted += "|the spill file was truncated"
    assert re.search(wanted, message), message
    # It stays stopped, and says why, also to who only knows the system's errors.
    with pytest.raises(OSError, match="the engine stopped: spilled") as again:
        booster.flush()
    assert again.value.errno == errno.EIO
    with pytest.raises(TierwiseError):
        optimizer.state_dict()


def test_a_disk_that_is_full_at_the_start_says_so_by_number(kit: Any, disk: Path) -> None:
    options = {**STATIC, "host_budget": least_host(kit, disk, **STATIC), "nvme_path": disk}
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    booster, *_ = kit.boosted(kit.llama(), **options)
    runtime = booster._runtime
    # The same plan with a spill file that the disk has no room for.
    plan = {**runtime.planned.plan, "nvme": {**runtime.planned.plan["nvme"], "file_bytes": 2 * free + 2**40}}
    with pytest.raises(StorageError, match=r"nvme_path .*cannot make a spill file of \d+ bytes.*; ") as caught:
        _core.Engine(
            runtime.layout,
            runtime.planned.trace_json,
            json.dumps(plan),
            _core.Device.emulated(),
            device_budget=2**40,
            host_budget=2**40,
            nvme_path=disk,
            nvme_budget=2**62,
        )
    error = caught.value
    assert isinstance(error, OSError)
    # A file system may find the size itself too large first.
    assert error.errno in (errno.ENOSPC, errno.EFBIG)
    assert error.strerror == os.strerror(error.errno)
    assert error.filename == str(disk)
    missing = disk / "missing"
    with pytest.raises(OSError, match="missing") as caught_missing:
        _core.probe_disk(missing)
    assert (caught_missing.value.errno, caught_missing.value.filename) == (errno.ENOENT, str(missing))


SCRIPT = """
import sys
sys.path[:0] = {path!r}
import tests.integration.conftest as kit
import os, resource, signal
how, directory, budget = sys.argv[1], sys.argv[2], int(sys.argv[3])
if how == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
result = kit.train(kit.llama(), steps=3, placement_policy="static", offload_optim_frac=1.0, host_budget=budget, nvme_path=directory)
print(repr(result.losses), os.listdir(directory), flush=True)
if how == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(how: str, disk: Path, budget: int) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    script = SCRIPT.format(path=[str(root), *[entry for entry in sys.path if entry]])
    arguments = [sys.executable, "-c", script, how, str(disk), str(budget)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_directory_and_a_killed_one_leaves_nothing(kit: Any, disk: Path) -> None:
    budget = least_host(kit, disk, **STATIC)
    reference = kit.train(kit.llama(), steps=3, **STATIC)
    running = [start(how, disk, budget) for how in ("kill", "plain", "kill")]
    for process in running:
        out, err = process.communicate(timeout=100)
        assert out == f"{reference.losses!r} []\n", err
    assert [process.returncode for process in running] == [-9, 0, -9]
    assert list(disk.iterdir()) == []


def test_a_file_that_cannot_be_that_large_is_an_error_before_the_first_step(kit: Any, disk: Path) -> None:
    process = start("limit", disk, least_host(kit, disk, **STATIC))
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert re.search(r"StorageError: nvme_path .*cannot make a spill file of \d+ bytes.*File too large.*ulimit -f", err), err
