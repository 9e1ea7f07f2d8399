"""Records real training steps, to compare the simulator's predictions with: one JSON file in the schema of `tierwise-sim validate`.

    tierwise calibrate --out machine.json
    python benchmarks/record.py --hardware machine.json --out runs.json --limit 480

Every configuration trains a Hugging Face LLaMA (random weights, bf16, AdamW) through `GeminiPlugin` in this process, one after the other.
The file is written again after each of them, so whatever ends the process, what was recorded stays. A configuration that runs out of memory
is a record too: it did not fit. `--skip` leaves out what an earlier file has.

A step is from the end of one backward pass to the end of the next on the compute stream, as the simulator counts it; the first steps are
not timed and nothing waits for the device between timed steps. `recorded` has the median, the times themselves, the allocator's peak of
device bytes since training began, the engine's peak of host bytes, and how long the compute stream waited per step. `executed` is the plan
that ran, after its correction. `observed` sums the timeline of two more steps by track and kind.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama import llama
from record_list import LISTS, Configuration

UNTIMED, PROFILED = 2, 2
LEFT_BYTES = 200_000_000
"""Of torch's own workspaces."""
NUMBERS = re.compile(r"\d+")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hardware", required=True, help="file of `tierwise calibrate`, of this machine and day")
    p.add_argument("--out", required=True, help="file to write")
    p.add_argument("--list", choices=LISTS, default="full")
    p.add_argument("--device", choices=("auto", "cuda", "emulated"), default="auto")
    p.add_argument("--limit", type=float, default=480, help="seconds after which no further configuration is begun")
    p.add_argument("--skip", action="append", default=[], help="file whose configurations are not recorded again")
    p.add_argument("--only", default=None, help="regular expression that names must match")
    return p


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


def train(run: Configuration, a: argparse.Namespace) -> dict[str, Any]:
    """One configuration; gives what `recorded`, `executed`, `planned` and `observed` hold."""
    import torch

    from tierwise.booster import Booster
    from tierwise.booster.plugin import GeminiPlugin
    from tierwise.observe.memory import peak_rss_bytes, reset_peak_rss

    cuda = a.device != "emulated" and torch.cuda.is_available()
    reset_peak_rss()
    started = time.perf_counter()
    model = llama(run.model(), "cuda" if cuda else "cpu", lazy=run.size == "7b")
    plugin = GeminiPlugin(
        precision="bf16",
        gradient_accumulation_steps=run.accumulation,
        micro_batch_size=run.micro_batch,
        seq_len=run.seq,
        enable_all_optimization=True,
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

    def step() -> None:
        for _ in range(run.accumulation):
            loss = model(input_ids=ids, labels=ids).loss
            booster.backward(loss, optimizer)
            del loss
        clock.mark()
        optimizer.step()
        optimizer.zero_grad()

    def rest() -> None:
        if cuda:
            torch.cuda.synchronize()

    for _ in range(UNTIMED):
        step()
    rest()
    before, clock.marks = booster.stats(), []
    for _ in range(run.timed + 1):
        step()
    rest()
    after, times = booster.stats(), clock.intervals()
    booster.record_timeline()
    for _ in range(PROFILED):
        step()
    booster.flush()
    rest()
    runtime = booster._boosted()
    spans = list(spans_of(runtime.engine.timeline()))
    steps = run.timed + 1
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
        "per_step": {name: (after[name] - before[name]) / steps for name in counters},
        "spans": summary(spans),
    }
    return {
        "recorded": recorded,
        "executed": executed(runtime),
        "plan_request": runtime.planned.wanted,
        "traced": traced(runtime),
        "observed": observed,
    }


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
        "rematerialized": runtime.saved.rematerialize,
        "stream_slab_bytes": plan["stream_slab_bytes"],
        "grad_in_flight_bytes": plan["grad_in_flight_bytes"],
        "undo_bytes": plan["undo_bytes"],
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
    return {"units": kinds, "outer_saved_bytes": runtime.trace.outer_saved_bytes, "temporary_bytes": runtime.temporary_bytes(runtime.trace)}


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


def record(run: Configuration, a: argparse.Namespace) -> dict[str, Any]:
    """A run in the schema of `validate`."""
    import torch

    from tierwise._core import TierwiseError

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
        return {**request, **train(run, a)}
    except (torch.OutOfMemoryError, TierwiseError, MemoryError) as error:
        # Only its text: the error's frames hold the model.
        failed = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    return {**request, "recorded": {"fits": False}, "failed": failed}


def clean() -> None:
    """Frees what a configuration held. Ends the recording if something stays: it would be in every later peak."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        left = torch.cuda.memory_allocated()
        if left > LEFT_BYTES:
            raise SystemExit(f"{left} device bytes stay allocated after a configuration; later peaks would be wrong")


def machine(a: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    import tierwise
    from tierwise.kernels.fused import liger_is_available

    cuda = a.device != "emulated" and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "emulated",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tierwise": tierwise.__version__,
        "liger_kernel": liger_is_available(),
        "kernel_threads": tierwise._core.kernel_threads(),
    }


def main() -> int:
    a = parser().parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    started = time.monotonic()
    # A configuration that hangs must not take the machine's time with it: everything recorded is in the file.
    watchdog = threading.Timer(a.limit + 90, lambda: os._exit(3))
    watchdog.daemon = True
    watchdog.start()
    done = {run["name"] for path in a.skip for run in json.loads(Path(path).read_text())["runs"]}
    wanted = [run for run in LISTS[a.list] if run.name not in done and (a.only is None or re.search(a.only, run.name))]
    used = {run.size: {"model_type": "llama", **run.model()} for run in wanted}
    result: dict[str, Any] = {
        "schema_version": 1,
        "source": f"benchmarks/record.py, {time.strftime('%Y-%m-%d')}",
        "machine": machine(a),
        "models": used,
        "runs": [],
    }
    for run in wanted:
        if time.monotonic() - started > a.limit:
            print(f"time is up: {len(wanted) - len(result['runs'])} configurations are left", flush=True)
            break
        begin = time.monotonic()
        try:
            found = record(run, a)
        except Exception as error:
            print(f"{run.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            clean()
            continue
        clean()
        result["runs"].append(found)
        partial = Path(f"{a.out}.partial")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(a.out)
        recorded = found["recorded"]
        took = time.monotonic() - begin
        if recorded["fits"]:
            spread = f"{min(recorded['step_times_s']):.4f} to {max(recorded['step_times_s']):.4f}"
            sizes = f"device {recorded['device_peak_bytes'] / 1e9:.2f} GB, host {recorded['host_peak_bytes'] / 1e9:.2f} GB"
            print(f"{run.name}: {recorded['step_s']:.4f} s ({spread}), {sizes}, took {took:.1f} s", flush=True)
        else:
            print(f"{run.name}: did not fit: {found['failed'][:160]}, took {took:.1f} s", flush=True)
    watchdog.cancel()
    print(f"{len(result['runs'])} of {len(wanted)} recorded in {time.monotonic() - started:.0f} s", flush=True)
    return 0 if result["runs"] else 1


if __name__ == "__main__":
    sys.exit(main())
