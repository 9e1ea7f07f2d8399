"""Trains recorded configurations, one after the other, in a process of its own that `record.py` starts and replaces."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import gzip
import json
import os
import re
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama import llama
from record_list import Configuration
from record_observed import executed, spans_of, summary, traced

from tierwise._core import HostBench

if TYPE_CHECKING:
    from tierwise.calibration.thread import LaunchProbe

UNTIMED, PROFILED, LEAST_TIMED = 2, 2, 3
LEFT_BYTES = 200_000_000
"""Of torch's own workspaces."""
OUTSIDE_BYTES = 2_500_000_000
"""Of the CUDA context, modules and libraries, beside what torch's allocator holds; more is somebody else's."""
LEFT_HOST_BYTES = 8_000_000_000
"""Resident memory that may stay more than at the worker's start: libraries, and pages that the allocator keeps."""
HOST_PROBE_S, THREAD_PROBE_S = 0.5, 0.2
"""Of the host's Adam, on as many parameters as it was calibrated on, and of the training thread, around every part of the timed steps: a
shared machine is faster in one moment than in the next."""
PARTS = 3
"""Of the timed steps of one visit; where there are more visits, each has one part."""
PATIENCE_S = 15.0
"""A process that ended gives its memory back with a delay."""
OUT_OF_MEMORY = re.compile(r"out.of.memory", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a configuration."""

    run: dict[str, Any] | None
    """In the schema of `validate`; None if it could not be recorded."""
    problem: str | None = None
    """Why it could not."""
    dirty: str | None = None
    """What is left behind in this process, which must not record anything more."""


def serve(pipe: Connection, a: argparse.Namespace) -> None:
    """Says what this machine is, then answers configurations until None comes."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch

    from tierwise.calibration.thread import LaunchProbe

    pipe.send(machine(a))
    bench = HostBench(calibrated(a)["measured"]["host_numel"])
    probes: Probes | None = None
    resident = None
    while (asked := pipe.recv()) is not None:
        run, first = asked
        try:
            wait_for_memory(a)
            resident = resident_bytes() if resident is None else resident
            probes = probes or Probes(bench, LaunchProbe(torch.device("cuda" if uses_cuda(a) else "cpu")))
            answer = Answer(run=record(run, a, probes, first))
        except Exception as error:
            answer = Answer(run=None, problem=f"{type(error).__name__}: {error}")
        pipe.send(dataclasses.replace(answer, dirty=left_behind(answer, resident or 0)))


def calibrated(a: argparse.Namespace) -> dict[str, Any]:
    """What this machine was found to be."""
    hardware: dict[str, Any] = json.loads(Path(a.hardware).read_text(encoding="utf-8"))
    return hardware


def wait_for_memory(a: argparse.Namespace) -> None:
    """Returns when the device is empty. Raises RuntimeError if it stays taken: peaks and out-of-memory errors would say nothing."""
    import torch

    if not uses_cuda(a):
        return
    until = time.monotonic() + PATIENCE_S
    while True:
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        if torch.cuda.memory_allocated() <= LEFT_BYTES and outside <= OUTSIDE_BYTES:
            return
        if time.monotonic() > until:
            held = torch.cuda.memory_allocated()
            raise RuntimeError(f"{held} device bytes are allocated before the run, {outside} outside the allocator")
        time.sleep(0.5)


def left_behind(answer: Answer, resident: int) -> str | None:
    """Frees what a configuration held, and says what cannot be freed."""
    import torch

    # The planner refuses before anything is allocated.
    if answer.run is None or not answer.run.get("failed", "BudgetError").startswith("BudgetError"):
        return "a configuration failed"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if torch.cuda.memory_allocated() > LEFT_BYTES:
            return f"{torch.cuda.memory_allocated()} device bytes stay allocated"
    grown = resident_bytes() - resident
    return f"{grown} host bytes stay resident" if grown > LEFT_HOST_BYTES else None


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def uses_cuda(a: argparse.Namespace) -> bool:
    import torch

    return a.device != "emulated" and torch.cuda.is_available()


class Probes:
    """How fast the host's kernels and the training thread are, again and again."""

    def __init__(self, bench: HostBench, thread: LaunchProbe) -> None:
        self.bench, self.thread = bench, thread
        self.host_adam_params_per_s: list[float] = []
        self.launch_probe_ns: list[float] = []

    def forget(self) -> None:
        """Begins anew."""
        self.host_adam_params_per_s, self.launch_probe_ns = [], []

    def take(self) -> None:
        """Measures both."""
        self.host_adam_params_per_s.append(self.bench.rate("adam", HOST_PROBE_S))
        self.launch_probe_ns.append(self.thread.ns(THREAD_PROBE_S))

    def taken(self) -> dict[str, list[float]]:
        """As a run has them."""
        return {"host_adam_params_per_s": self.host_adam_params_per_s, "launch_probe_ns": self.launch_probe_ns}


class Clock:
    """Marks on the compute stream; the wall clock where there is no device."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Now, on the compute stream."""
        if not self.cuda:
            self.marks.append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def intervals(self) -> list[float]:
        """Seconds between marks, once they have passed."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        return [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in pairs]


def train(run: Configuration, a: argparse.Namespace, probes: Probes, first: bool) -> dict[str, Any]:
    """One visit of a configuration; gives what `recorded`, `executed` and `observed` hold, and the probes. Only the first has spans."""
    import torch

    from tierwise.booster import Booster
    from tierwise.booster.plugin import GeminiPlugin
    from tierwise.observe.memory import peak_rss_bytes, reset_peak_rss

    cuda = uses_cuda(a)
    reset_peak_rss()
    started = time.perf_counter()
    model = llama(run.model(), "cuda" if cuda else "cpu", lazy=run.size == "7b")
    plugin = GeminiPlugin(
        precision="bf16",
        gradient_accumulation_steps=run.accumulation,
        micro_batch_size=run.micro_batch,
        seq_len=run.seq,
        enable_all_optimization=True,
        host_adam_params_per_second=calibrated(a)["host_adam_params_per_s"],
        device=a.device,
        **run.plugin_options(),
    )
    booster = Booster(plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    model, optimizer, *_ = booster.boost(model, optimizer)
    model.train()
    boosted = time.perf_counter()
    ids = torch.randint(0, run.model()["vocab_size"], (run.micro_batch, run.seq), device="cuda" if cuda else "cpu")
    clock = Clock(cuda)
    thread: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}

    def step() -> None:
        for _ in range(run.accumulation):
            begin = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            forward = time.perf_counter()
            booster.backward(loss, optimizer)
            del loss
            backward = time.perf_counter()
            thread["forward"].append(forward - begin)
            thread["backward"].append(backward - forward)
        clock.mark()
        begin = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        thread["step"].append(time.perf_counter() - begin)

    def rest() -> None:
        if cuda:
            torch.cuda.synchronize()

    for _ in range(UNTIMED):
        step()
    rest()
    before = booster.stats()
    for values in thread.values():
        values.clear()
    times: list[float] = []
    probes.forget()
    steps = 0
    # The median of fewer would be as noisy as they are.
    timed = max(-(-run.timed_steps // a.visits), min(run.timed_steps, LEAST_TIMED))
    parts = min(PARTS, timed) if a.visits == 1 else 1
    for _ in range(parts):
        # Between two marks is a whole step, all of whose work was asked for in this part.
        booster.flush()
        rest()
        probes.take()
        clock.marks = []
        for _ in range(-(-timed // parts) + 1):
            step()
            steps += 1
        rest()
        times += clock.intervals()
    after = booster.stats()
    booster.flush()
    rest()
    probes.take()
    thread_s = {name: round(statistics.median(values), 6) for name, values in thread.items()}
    runtime = booster._boosted()
    spans: dict[str, Any] = {}
    if first:
        booster.record_timeline()
        for _ in range(PROFILED):
            step()
        booster.flush()
        rest()
        timeline = runtime.engine.timeline()
        if a.timelines is not None:
            Path(a.timelines, re.sub(r"[ /]", "_", run.name) + ".json.gz").write_bytes(gzip.compress(timeline.encode()))
        spans = summary(list(spans_of(timeline)))
    counters = ("wait_ns", "fetches", "demand_fetches", "evictions", "clipped", "speculated", "undone", "h2d_bytes", "d2h_bytes")
    recorded = {
        "fits": True,
        "step_s": statistics.median(times),
        "step_times_s": [round(t, 6) for t in times],
        "host_peak_bytes": after["host_peak_bytes"],
        "wait_s": (after["wait_ns"] - before["wait_ns"]) / 1e9 / steps,
    }
    if cuda:
        free, total = torch.cuda.mem_get_info()
        recorded["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        observed_device = {
            "device_reserved_peak_bytes": torch.cuda.max_memory_reserved(),
            "device_outside_allocator_bytes": total - free - torch.cuda.memory_reserved(),
        }
    else:
        recorded["device_peak_bytes"] = after["device_peak_bytes"]
        observed_device = {}
    observed = {
        **observed_device,
        "process_peak_bytes": peak_rss_bytes(),
        "boost_s": round(boosted - started, 2),
        "thread_s": thread_s,
        "per_step": {name: (after[name] - before[name]) / steps for name in counters},
        "spans": spans,
    }
    return {
        "recorded": recorded,
        "executed": executed(runtime),
        "plan_request": runtime.planned.wanted,
        "traced": traced(runtime),
        "observed": observed,
        **probes.taken(),
    }


def record(run: Configuration, a: argparse.Namespace, probes: Probes, first: bool) -> dict[str, Any]:
    """A run in the schema of `validate`. One that runs out of memory did not fit; other errors are raised."""
    import torch

    from tierwise._core import BudgetError, TierwiseError

    request = {
        "name": run.name,
        "model": run.size,
        "hardware": Path(a.hardware).name,
        "seq": run.seq,
        "micro_batch": run.micro_batch,
        "tokens_per_step": run.tokens,
        **run.request(),
    }
    try:
        return {**request, **train(run, a, probes, first)}
    except (torch.OutOfMemoryError, TierwiseError, MemoryError) as error:
        if isinstance(error, TierwiseError) and not isinstance(error, BudgetError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        failed = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    return {**request, "recorded": {"fits": False}, "failed": failed}


def machine(a: argparse.Namespace) -> dict[str, Any]:
    """What recorded."""
    import torch
    import transformers

    import tierwise
    from tierwise.kernels.fused import liger_is_available

    return {
        "device": torch.cuda.get_device_name() if uses_cuda(a) else "emulated",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tierwise": tierwise.__version__,
        "liger_kernel": liger_is_available(),
        "kernel_threads": tierwise._core.kernel_threads(),
    }
